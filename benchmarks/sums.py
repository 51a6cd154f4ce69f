"""Operations of sums of matrices beside those of one KFAC matrix: ``python -m benchmarks.sums [--docs PAGE]``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import nngeom as nng
from benchmarks import report
from benchmarks.timing import clock

OPERATIONS = ("solve", "sample", "norm", "logdet", "estimated logdet", "lanczos(10)", "inverse", "eigh")
UNDAMPED = "two definite KFAC, no damping"
SLOW = 2.0  # seconds, above which an operation is timed once


def matrices() -> dict[str, Any]:
    """Sums over a net of three layers of 64, 64 and 10 units, 8970 parameters, of two tasks of 300 examples."""
    torch.manual_seed(0)
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = nn.Sequential(*layers).double()
    one, two, three = (_task(seed) for seed in range(3))
    f, g, h = (nng.FIM(model, task, nng.PMatKFAC) for task in (one, two, three))
    prior = nng.PMatEye.build(f.layer_collection, 0.1, dtype=torch.float64)
    rows = lambda n: nng.FIM(model, [(x[:n], y[:n]) for x, y in two], nng.PMatLowRank)
    return {
        "KFAC": f,
        "KFAC + Eye": f + prior,
        "KFAC + KFAC": f + g,
        "KFAC + KFAC + Eye": f + g + prior,
        "KFAC + KFAC + KFAC": f + g + h,
        "KFAC + Diag": f + nng.FIM(model, two, nng.PMatDiag),
        "KFAC + EKFAC": f + nng.FIM(model, two, nng.PMatEKFAC),
        "KFAC + its own EKFAC": f + nng.FIM(model, one, nng.PMatEKFAC),
        "KFAC - KFAC / 2": f - 0.5 * f,
        "KFAC + QuasiDiag": f + nng.FIM(model, two, nng.PMatQuasiDiag),
        "KFAC + LowRank of 72 rows": f + rows(8),
        "KFAC + LowRank of 270 rows": f + rows(30),
        UNDAMPED: _definite(f) + _definite(g),
    }


def _definite(matrix: nng.PMatKFAC) -> nng.PMatKFAC:
    """With a hundredth of its mean added to the diagonal of every factor."""
    shifted = lambda x: x + 0.01 * x.diagonal().mean() * torch.eye(len(x), dtype=x.dtype)
    factors = {layer: (shifted(a), shifted(g)) for layer, (a, g) in matrix.factors().items()}
    return nng.PMatKFAC.from_factors(matrix.layer_collection, factors)


def _task(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, 64, dtype=torch.float64)[torch.randperm(64, generator=g)]
    return [(torch.randn(300, 64, generator=g, dtype=torch.float64) * scale, torch.zeros(300, dtype=torch.long))]


def operations(m: Any, damping: float) -> dict[str, Callable[[], Any]]:
    """What is timed, of one matrix; of a single one its own ``logdet`` and ``eigh`` in place of what sums have."""
    single = isinstance(m, nng.PMatKFAC)
    v = nng.PVector.randn(m.layer_collection, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {
        "solve": lambda: m.solve(v, damping),
        "sample": lambda: m.sample(1, damping),
        "norm": m.norm,
        "logdet": lambda: m.logdet(damping),
        "estimated logdet": lambda: m.logdet(damping) if single else m.logdet(damping, estimator="slq"),
        "lanczos(10)": lambda: m.eigh() if single else m.lanczos(10),
        "inverse": lambda: m.inverse(damping),
        "eigh": m.eigh,
    }


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The least of several calls; NaN where the matrix is indefinite at this damping, or has no such operation."""
    try:
        found = [clock(run, "cpu")]
    except (nng.SingularError, nng.UnsupportedError):
        return float("nan")
    while len(found) < repeats and found[0] < SLOW:
        found.append(clock(run, "cpu"))
    return min(found)


def measured(
    damping: float, repeats: int, chosen: tuple[str, ...], names: list[str] | None = None
) -> dict[str, dict[str, float]]:
    """Seconds of every operation of every sum, or of those of these names, and of one KFAC matrix."""
    found: dict[str, dict[str, float]] = {}
    for name, m in matrices().items():
        if names is not None and name not in ("KFAC", *names):
            continue
        runs = operations(m, 0.0 if name == UNDAMPED else damping)
        found[name] = {operation: seconds(runs[operation], repeats) for operation in chosen}
        print(name, {k: f"{1e3 * s:.2f} ms" for k, s in found[name].items()}, flush=True)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Ratios to the first matrix, whose milliseconds are given."""
    (base, first), *rest = found.items()
    lines = ["| | " + " | ".join(first) + " |", "|---" * (len(first) + 1) + "|"]
    lines.append(f"| {base}, ms | " + " | ".join(f"{1e3 * s:.2f}" for s in first.values()) + " |")
    for name, times in rest:
        lines.append(f"| {name} | " + " | ".join(_ratio(s, first[k]) for k, s in times.items()) + " |")
    return "\n".join(lines)


def _ratio(x: float, base: float) -> str:
    return "-" if math.isnan(x) else f"{x / base:.3g}"


def main(argv: list[str] | None = None) -> None:
    """Time, print the table, write it into a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sums", description=__doc__)
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--operation", nargs="*", default=list(OPERATIONS), choices=OPERATIONS)
    parser.add_argument("--only", nargs="*", help="names of sums, beside KFAC")
    parser.add_argument("--docs", help="write the table into this Markdown file, between its marks")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    text = table(measured(options.damping, options.repeats, tuple(options.operation), options.only))
    print(text)
    if options.docs:
        report.into(options.docs, "sums", text)


if __name__ == "__main__":
    main()
