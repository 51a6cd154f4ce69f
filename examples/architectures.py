"""Are matrices right on the architectures of ``transformers``? Small random models against plain autograd, in float64.

    python -m examples.architectures                    # all: docs/data/architectures.json, docs/architectures.md
    python -m examples.architectures --quick            # a few, printed only
    python -m examples.architectures --count 20 --seed 7    # other sizes and weights, printed only
    python -m examples.architectures --render           # the table from the file

Outputs, whatever their shape, are mapped to three numbers an example by a fixed random matrix, so that every one of
them counts; the Jacobian and the diagonals of the exact and of the empirical Fisher matrix are compared with loops.
"""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from benchmarks import report
from examples.architecture_zoo import ZOO, build

DOCS = Path(__file__).parent.parent / "docs"
QUICK = ("BERT", "GPT-2", "Mixtral", "Mamba", "T5", "ResNet", "Whisper", "CLIP, similarities")
OUTPUTS = 3
TOLERANCE = 1e-5  # many models take norms, rotations or logits in float32 inside


def outputs_of(name: str) -> Callable[[Any], Tensor]:
    """What is differentiated of a model's results: logits, or embeddings of both towers."""

    def choose(results: Any) -> Tensor:
        if name.endswith("similarities"):
            return results.logits_per_image
        logits = getattr(results, "logits", None)
        return logits if logits is not None else torch.cat([results.text_embeds, results.image_embeds], 1)

    return choose


@functools.cache
def mix(size: int) -> Tensor:
    """A random matrix ``(size, 3)``, drawn once."""
    draw = torch.Generator().manual_seed(size)
    return torch.randn(size, OUTPUTS, generator=draw, dtype=torch.float64) / size**0.5


def function_of(name: str, model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """The outputs ``(n, 3)`` of a batch."""
    choose = outputs_of(name)

    def function(batch: dict[str, Tensor]) -> Tensor:
        flat = choose(model(**{k: v for k, v in batch.items() if k != "labels"})).flatten(1).double()
        return flat @ mix(flat.shape[1])

    return function


def truth(parameters: list[Tensor], outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Rows of the Jacobian ``(c, n, d)`` by one backward pass each, and the two diagonals made of them."""
    rows = []
    for f in outputs.T.flatten():
        grads = torch.autograd.grad(f, parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters)]))
    j = torch.stack(rows).view(OUTPUTS, len(outputs), -1)
    p = outputs.detach().softmax(1).T.unsqueeze(2)
    mean = (p * j).sum(0)
    residual = p - F.one_hot(labels, OUTPUTS).T.unsqueeze(2)
    return {
        "Jacobian": j,
        "FIM": (p * (j - mean).square()).sum(0).mean(0),
        "EmpiricalFIM": (residual * j).sum(0).square().mean(0),
    }


def measures(model: nn.Module, batch: dict[str, Tensor], function: Any) -> dict[str, Callable[[], Tensor]]:
    """The same by the library."""
    given = {"model": model, "loader": [batch], "function": function}
    loss = "cross_entropy"
    return {
        "Jacobian": lambda: nng.Jacobian(**given).tensor,
        "FIM": lambda: nng.FIM(**given, representation=nng.PMatDiag).diag().flat(),
        "EmpiricalFIM": lambda: nng.EmpiricalFIM(**given, representation=nng.PMatDiag, loss=loss).diag().flat(),
    }


def error_of(got: Tensor, want: Tensor, sizes: list[int]) -> float:
    """The largest relative error of a parameter; what is a millionth of the whole or less is measured by that."""
    floor = 1e-6 * float(want.norm())
    pairs = zip(got.double().split(sizes, -1), want.split(sizes, -1))
    return max(float((a - b).norm()) / max(float(b.norm()), floor) for a, b in pairs)


def trial(name: str, seed: int) -> dict[str, Any]:
    """One architecture, measured and compared."""
    started = time.process_time()
    model, batch = build(name, seed)
    function = function_of(name, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    labels = torch.arange(len(next(iter(batch.values())))) % OUTPUTS
    batch["labels"] = labels
    want = truth(parameters, function(batch), labels)
    outcome, error, reason = "exact", 0.0, ""
    for measure, got in measures(model, batch, function).items():
        try:
            off = error_of(got(), want[measure], [p.numel() for p in parameters])
        except nng.NNGeomError as refusal:
            outcome, reason = "refused", f"{type(refusal).__name__}: {refusal}"
        except Exception as crash:
            outcome, reason = "crash", f"{measure}: {type(crash).__name__}: {crash}"
        else:
            error = max(error, off)
            if not off <= TOLERANCE:
                outcome, reason = "WRONG", f"{measure}: relative error {off:.1e}"
        if outcome != "exact":
            break
    seconds, exact = time.process_time() - started, outcome == "exact"
    rows = nng.explain(model, batch, function=function).rows if exact else []
    return {
        "name": name,
        "family": ZOO[name][0],
        "model": type(model).__name__,
        "seed": seed,
        "parameters": sum(p.numel() for p in parameters),
        "tensors": len(parameters),
        "fallback": sum(row.structure == "fallback" for row in rows) if exact else None,
        "outcome": outcome,
        "error": error if exact else None,
        "reason": reason.split("\n")[0],
        "seconds": seconds,
    }


def markdown(results: dict[str, Any]) -> str:
    """The table of the documentation, and its sum."""
    rows = ["| family | architecture | class | parameters | example by example | result |", "|---|---|---|---|---|---|"]
    for r in results["trials"]:
        exact = r["outcome"] == "exact"
        result = f"exact ({r['error']:.0e})" if exact else f"{r['outcome']}: {r['reason']}".replace("|", "/")
        slow = f"{r['fallback']} of {r['tensors']}" if exact else "-"
        rows.append(f"| {r['family']} | {r['name']} | `{r['model']}` | {r['parameters']:,} | {slow} | {result} |")
    return "\n".join([*rows, "", summary(results["trials"]) + f", with {results['environment']}."])


def summary(trials: list[dict[str, Any]]) -> str:
    """How many ended how."""
    outcomes = [r["outcome"] for r in trials]
    parts = [f"{outcomes.count(kind)} {kind}" for kind in ("exact", "refused", "WRONG", "crash") if kind in outcomes]
    return f"Of {len(trials)}: {', '.join(parts)}"


def trials_of(names: list[str], seed: int) -> Iterator[dict[str, Any]]:
    """Run and print one after the other."""
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = trial(name, seed)
        words = f"({found['error']:.1e})" if found["outcome"] == "exact" else found["reason"]
        start = f"{found['name']:20s} {found['parameters']:>7,} {found['seconds']:6.1f} s"
        print(f"{start}  {found['outcome']} {words}", flush=True)
        yield found


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--count", type=int, help="only the first of the list")
    parser.add_argument("--only", nargs="+", choices=list(ZOO), help="only these")
    parser.add_argument("--seed", type=int, default=0, help="of sizes, weights and inputs")
    parser.add_argument("--render", action="store_true", help="run nothing; write the table from the file")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of architectures.md and data/")
    options = parser.parse_args(argv)
    path, page = options.docs / "data" / "architectures.json", options.docs / "architectures.md"
    if options.render:
        report.into(str(page), "architectures", markdown(report.load(str(path))))
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    names = options.only or list(QUICK if options.quick else ZOO)[: options.count]
    trials = list(trials_of(names, options.seed))
    print(summary(trials))
    if len(names) == len(ZOO) and options.seed == 0:
        environment = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
        results = report.merge(str(path), environment=environment, trials=trials)
        report.into(str(page), "architectures", markdown(results))


if __name__ == "__main__":
    main()
