"""``python -m benchmarks.rows``: nets that nobody tuned, a row each, beside one forward and backward pass in turn.

Wide outputs and vocabularies, recurrent cells, tiny nets, several vectors at once, and the largest
eigenvalues of a large matrix in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from benchmarks import report
from benchmarks.timing import interleaved

Runs = dict[str, Callable[[], Any]]
Row = tuple[Callable[[], Any], Runs]


def _floor(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """One forward and one backward pass."""
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(F.cross_entropy(model(x), y), parameters)


def _fishers(model: nn.Module, x: Tensor, y: Tensor) -> Runs:
    kinds = {"diagonal": nng.PMatDiag, "KFAC": nng.PMatKFAC, "EKFAC": nng.PMatEKFAC}
    return {name: lambda kind=kind: nng.FIM(model, (x, y), kind) for name, kind in kinds.items()}


def wide(device: str, outputs: int = 1000, n: int = 64, width: int = 256) -> Row:
    """Exact Fisher matrices of an MLP with many outputs."""
    layers = (nn.Linear(128, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))
    model, x, y = nn.Sequential(*layers).to(device), torch.randn(n, 128), torch.randint(0, outputs, (n,))
    x, y = x.to(device), y.to(device)
    return _floor(model, x, y), _fishers(model, x, y)


class Next(nn.Module):
    """A decoder that gives the logits of the next word only."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.embed, self.head = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
        self.mix = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(n, t)`` to ``(n, words)``."""
        return self.head(self.mix(self.embed(x))[:, -1])


def vocabulary(device: str, words: int = 50257, n: int = 8, width: int = 64) -> Row:
    """The exact KFAC Fisher matrix of a net with the outputs of GPT-2."""
    model = Next(words, width).to(device)
    x, y = (torch.randint(0, words, size).to(device) for size in ((n, 16), (n,)))
    runs = _fishers(model, x, y)
    return _floor(model, x, y), {"KFAC": runs["KFAC"]}


class Recurrent(nn.Module):
    """A recurrent cell and a head on its last state."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.cell, self.head = nn.GRU(inputs, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, t, inputs)`` to ``(n, 10)``."""
        return self.head(self.cell(x)[0][:, -1])


def recurrent(device: str, inputs: int = 16, width: int = 32, n: int = 64) -> Row:
    """A solve with a GRU, at another damping every time and at the same."""
    model, x, y = Recurrent(inputs, width).to(device), torch.randn(n, 10, inputs).to(device), torch.randint(0, 10, (n,))
    m, other = (nng.FIM(model, (x, y.to(device)), nng.PMatKFAC) for _ in range(2))
    v = nng.PVector.randn(m.layer_collection).to(device)
    number = iter(range(1, 10**9))
    runs = {
        "KFAC solve, another damping": lambda: m.solve(v, 1e-2 + 1e-6 * next(number)),
        "KFAC solve, the same damping": lambda: other.solve(v, 1e-2),
    }
    return _floor(model, x, y.to(device)), runs


def tiny(device: str) -> Row:
    """A net whose measures are all Python."""
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3)).to(device)
    x, y = torch.randn(32, 10).to(device), torch.randint(0, 3, (32,)).to(device)
    data = (x, y)
    return _floor(model, x, y), {
        "KFAC": lambda: nng.FIM(model, data, nng.PMatKFAC),
        "Gram matrix": lambda: nng.GramMatrix(model, data),
        "Jacobian": lambda: nng.Jacobian(model, data),
    }


def vectors(device: str, width: int = 256) -> Row:
    """Products of the implicit Fisher matrix; the floor is one with one vector."""
    layers = (nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    model, x = nn.Sequential(*layers).to(device), torch.randn(64, 64).to(device)
    m = nng.FIM(model, (x, None), nng.PMatImplicit)
    one, several = (nng.PVector.randn(m.layer_collection, *k).to(device) for k in ((), (8,)))
    return lambda: m.mv(one), {"8 vectors at once": lambda: m.mv(several)}


def eigenvalues(device: str, width: int = 340) -> Row:
    """The five largest eigenvalues in float32, about 2.7e5 parameters; the floor is one product."""
    layers = (nn.Linear(100, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 340), nn.Tanh())
    model, x = nn.Sequential(*layers, nn.Linear(340, 10)).to(device), torch.randn(64, 100).to(device)
    m = nng.FIM(model, (x, None), nng.PMatImplicit)
    v = nng.PVector.randn(m.layer_collection).to(device)
    return lambda: m.mv(v), {"lanczos(5)": lambda: m.lanczos(5)}


ROWS: dict[str, tuple[str, Callable[..., Row]]] = {
    "wide": ("MLP 128-256-256-1000, 64 examples", wide),
    "vocabulary": ("decoder of width 64, 50 257 words, 8 sequences of 16", vocabulary),
    "recurrent": ("GRU(16, 32), 64 sequences of 10", recurrent),
    "tiny": ("MLP 10-32-3, 32 examples", tiny),
    "vectors": ("MLP 64-256-256-10, implicit Fisher matrix; floor: one product", vectors),
    "eigenvalues": ("MLP 100-340-340-340-10, implicit Fisher matrix; floor: one product", eigenvalues),
}


def measured(name: str, device: str, repeats: int, **sizes: int) -> dict[str, Any]:
    """One row: milliseconds and multiples of the floor, medians of interleaved rounds."""
    torch.manual_seed(0)
    title, make = ROWS[name]
    floor, runs = make(device, **sizes)
    series = interleaved(floor, runs, repeats, device, 0.01)
    timed = {label: s.summary() for label, s in series.items()}
    return {"row": name, "title": title, "floor": timed.pop("floor"), "contenders": timed}


def markdown(results: dict[str, Any]) -> str:
    """The table of the documentation."""
    lines = ["| net | job | floor ms | floors (quartiles) | ms |", "|---|---|---|---|---|"]
    for r in results["rows"]:
        for job, s in r["contenders"].items():
            spread = f"{s['ratio']:.3g} ({s['ratio_q1']:.3g}-{s['ratio_q3']:.3g})"
            floor = f"{r['floor']['median_ms']:.2f}"
            lines.append(f"| {r['title']} | {job} | {floor} | {spread} | {s['median_ms']:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the chosen rows, write JSON and the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--row", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="write the results here; other rows of the file stay")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--docs", help="write the table into this Markdown file, between its marks")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    results = report.load(options.json)
    for name in [] if options.render else options.row:
        record = measured(name, options.device, options.repeats)
        rows = report.replaced(results.get("rows", []), record, ("row",))
        rows.sort(key=lambda r: list(ROWS).index(r["row"]))
        results = report.merge(options.json, environment=report.environment(options.device), rows=rows)
        print(markdown({"rows": [record]}), flush=True)
    if options.docs:
        report.into(options.docs, "rows", markdown(results))


if __name__ == "__main__":
    main()
