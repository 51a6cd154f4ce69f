"""The constants of columns that are set apart in sums: errors and costs of others, ``python -m benchmarks.apart``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import nngeom as nng
from benchmarks import report
from benchmarks.sums import seconds
from nngeom.pmat import balanced, set_apart

GRID = {
    "APART": (balanced, (0.0, 0.25, 0.5, 1.0)),
    "MOST": (set_apart, (0, 64, 256, 512)),
    "LEAST": (set_apart, (1e-6, 1e-3, 1e-1)),
}
DAMPING, SIGNS = 1e-3, 8


def _sums(width: int) -> tuple[Any, dict[str, Any]]:
    """KFAC of one task, and its sums with diagonals of another, over a net with a hidden layer of this ``width``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 10)).double()
    scale = torch.logspace(0, -1.5, 32, dtype=torch.float64)
    one, two = ([(torch.randn(300, 32, dtype=torch.float64) * scale[torch.randperm(32)],)] for _ in range(2))
    f = nng.FIM(model, one, nng.PMatKFAC)
    diagonal = nng.FIM(model, two, nng.PMatDiag)
    named = {"KFAC + Diag": f + diagonal, "KFAC + EKFAC + Diag": f + nng.FIM(model, two, nng.PMatEKFAC) + diagonal}
    return f, {f"{name}, {width} units": m for name, m in named.items()}


@contextmanager
def _set(name: str, value: float) -> Iterator[None]:
    module = GRID[name][0]
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _measured(m: Any, repeats: int) -> tuple[float, float]:
    """The standard error a parameter, and seconds, of an estimate from a fixed number of signs."""
    errors = []

    def estimate() -> None:
        found = m.logdet(DAMPING, estimator="slq", samples=SIGNS, tol=0.0, generator=torch.Generator().manual_seed(0))
        errors.append(float(found.standard_error) / m.shape[0])

    least = seconds(estimate, repeats)
    return errors[0], least


def table(widths: list[int], repeats: int) -> str:
    """A line a value of a constant, the others as they are: error by 1e-6, and time over one KFAC's ``logdet``."""
    cases = [(f, name, m) for f, named in map(_sums, widths) for name, m in named.items()]
    lines = ["| | " + " | ".join(name for _, name, _ in cases) + " |", "|---" * (len(cases) + 1) + "|"]
    base = [seconds(lambda f=f: f.logdet(DAMPING), repeats) for f, _, _ in cases]  # type: ignore[misc]
    for constant, (module, values) in GRID.items():
        for value in values:
            mark = " (taken)" if value == getattr(module, constant) else ""
            with _set(constant, value):
                found = [_measured(m, repeats) for _, _, m in cases]
            cells = (f"{1e6 * error:.3g}, {t / b:.3g}" for (error, t), b in zip(found, base))
            lines.append(f"| {constant} {value:g}{mark} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write it into a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.apart", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 300])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--docs", help="write the table into this Markdown file, between its marks")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    text = table(options.widths, options.repeats)
    print(text)
    if options.docs:
        report.into(options.docs, "apart", text)


if __name__ == "__main__":
    main()
