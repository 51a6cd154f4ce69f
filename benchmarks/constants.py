"""Two constants at other values: ``python -m benchmarks.constants [--json FILE] [--docs PAGE]``.

``PIECE``: the bytes of rows that are turned into a Kronecker eigenbasis at once. ``CLEAR``: how far the pivots of
several factors must be from zero for these to be inverted with one question.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import nngeom as nng
from benchmarks import report
from benchmarks.timing import interleaved
from nngeom.core import factor_inverses, lapack, linalg
from nngeom.core.errors import SingularError
from nngeom.pmat import kronecker_basis
from nngeom.pmat.kronecker_basis import KroneckerBasis

f64 = torch.float64
PIECES = tuple(2**k for k in (16, 18, 19, 20, 21, 22, 24))
ROWS = {"72 rows, 64 x 64": (72, 64), "270 rows, 64 x 64": (270, 64), "128 rows, 128 x 128": (128, 128)}
CLEARS = (1.0, 1.001, 2.0, 64.0, 4096.0)


def pieces(rows: str, repeats: int, sizes: tuple[int, ...] = PIECES) -> dict[str, Any]:
    """Milliseconds in which rows are turned into a Kronecker eigenbasis and multiplied, by the bytes of a piece."""
    m, p = ROWS[rows]
    ua, ug = (torch.linalg.qr(torch.randn(1, p, p, dtype=f64))[0] for _ in range(2))
    model = nn.Linear(p, p, bias=False, dtype=f64)
    ((layout, _),) = nng.FIM(model, torch.randn(2, p, dtype=f64), nng.PMatKFAC, likelihood="gaussian").blocks.items()
    r, scale, basis = torch.randn(m, p * p, dtype=f64), torch.rand(1, p, p, dtype=f64), KroneckerBasis(ua, ug)
    kept = kronecker_basis.PIECE

    def run(piece: int) -> Tensor:
        kronecker_basis.PIECE = piece
        return lapack.half_gram(r, basis.columns_of(r, layout, scale))

    runs = {str(piece): lambda piece=piece: run(piece) for piece in sizes}
    try:
        series = interleaved(lambda: run(kept), runs, repeats, "cpu", 0.03)
    finally:
        kronecker_basis.PIECE = kept
    return {"rows": rows, "ratios": {k: s.summary()["ratio"] for k, s in series.items() if k != "floor"}}


def factor(p: int, pivot: float, dtype: torch.dtype, seed: int) -> Tensor:
    """A factor ``[1, p, p]`` with a unit diagonal but for the last pivot, a multiple of what counts as zero."""
    g = torch.Generator().manual_seed(seed)
    root = torch.eye(p, dtype=f64) + 0.1 * torch.randn(p, p, generator=g, dtype=f64).tril(-1) / p**0.5
    root[-1] = 0.1 * torch.randn(p, generator=g, dtype=f64) / p**0.5
    size = float((root @ root.T).diagonal().amax())
    root[-1, -1] = (pivot * p * torch.finfo(dtype).eps * size) ** 0.5
    return (root @ root.T).to(dtype).unsqueeze(0)


def bordering(p: int, ulps: int, dtype: torch.dtype) -> Tensor:
    """The identity ``[1, p, p]`` but for a last pivot so many roundings above what counts as zero."""
    m, eps = torch.eye(p, dtype=dtype), torch.finfo(dtype).eps
    m[-1, -1] = p * eps * (1 + ulps * eps)
    return m.unsqueeze(0)


def inverted(factors: list[Tensor], clear: float | None) -> list[Tensor] | None:
    """Inverses at a value of ``CLEAR`` (``None``: one by one); ``None`` where refused."""
    kept, names = factor_inverses.CLEAR, [""] * len(factors)
    try:
        if clear is None:
            return list(map(linalg.factor_inverse, factors, names))
        factor_inverses.CLEAR = clear
        return factor_inverses.factor_inverses(factors, names)
    except SingularError:
        return None
    finally:
        factor_inverses.CLEAR = kept


def clears(dtype: torch.dtype, repeats: int, draws: int = 200) -> dict[str, Any]:
    """By ``CLEAR``: factors on which it answers otherwise than one by one, and milliseconds for ten well-behaved
    ones; by the last pivot: errors of inverses, in units of the rounding error and of the condition number.
    """
    cases = [factor(p, x, dtype, seed) for p in (3, 8, 40) for x in (1.0, 1.5, 3.0) for seed in range(draws // 4)]
    cases += [bordering(p, ulps, dtype) for p in range(3, 18) for ulps in range(-6, 7)]
    alone = [inverted([m], None) is None for m in cases]
    differ = {str(c): sum((inverted([m], c) is None) != refused for m, refused in zip(cases, alone)) for c in CLEARS}
    well = [factor(p, 1e5, dtype, p) for p in (4, 8, 11, 16, 17, 32, 33, 40, 64, 65)]
    runs = {"one by one": lambda: inverted(well, None), "at once": lambda: inverted(well, 2.0)}
    runs["at once, then one by one"] = lambda: inverted(well, 1e30)
    series = interleaved(runs["one by one"], runs, repeats, "cpu", 0.02)
    times = {name: s.summary()["ratio"] for name, s in series.items() if name != "floor"}
    errors = {}
    for x in (2.0, 1e2, 1e4):
        worst, condition = 0.0, 0.0
        for seed in range(draws // 10):
            m = factor(8, x, dtype, seed)
            found, right = inverted([m], 2.0), torch.linalg.inv(m.double())
            values = torch.linalg.eigvalsh(m.double())
            condition = max(condition, float(values[0, -1] / values[0, 0]))
            if found is not None:
                worst = max(worst, float((found[0].double() - right).norm() / right.norm()))
        errors[str(x)] = [condition, worst]
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "cases": len(cases), "differ": differ, "times": times, "errors": errors}


def markdown(results: dict[str, Any]) -> str:
    """The tables of the documentation."""
    sizes = [str(piece) for piece in PIECES]
    lines = ["| bytes of a piece | " + " | ".join(f"{int(s) // 2**10} KiB" for s in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for r in results["pieces"]:
        lines.append(f"| {r['rows']} | " + " | ".join(f"{r['ratios'][s]:.2f}" for s in sizes) + " |")
    lines += ["", "| factors | " + " | ".join(f"`CLEAR` {c:g}" for c in CLEARS) + " | at once | at once, then alone |"]
    lines.append("|---" * (len(CLEARS) + 3) + "|")
    for r in results["clears"]:
        differ = " | ".join(f"{r['differ'][str(c)]} of {r['cases']}" for c in CLEARS)
        times = f"{r['times']['at once']:.2f} | {r['times']['at once, then one by one']:.2f}"
        lines.append(f"| {r['dtype']} | {differ} | {times} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, write JSON and the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.constants", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--docs", help="write the tables into this Markdown file, between its marks")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {
        "pieces": [pieces(rows, options.repeats) for rows in ROWS],
        "clears": [clears(dtype, options.repeats) for dtype in (f64, torch.float32)],
    }
    results = report.merge(options.json, environment=report.environment("cpu"), **found)
    print(markdown(results))
    print({r["dtype"]: r["errors"] for r in results["clears"]})
    if options.docs:
        report.into(options.docs, "constants", markdown(results))


if __name__ == "__main__":
    main()
