"""SuperNat against gradient descent: learning a rescaling of the features fits the signal and freezes the noise.

    python examples/supernat.py [--seeds 40] [--quick]

Linear regression from n = 50 points: one signal feature ``phi ~ N(0, 1)``, d = 10 noise features ``N(0, I/d)``, and
labels ``y = phi + Phi_noise Phi_noise^T e`` with ``e ~ N(0, 0.1 I)``; the test error is against the signal alone.
Full-batch steps of 0.5 on the mean loss.

Protocol: Baratin et al. 2021, fig. 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, band, figure
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from torch import Tensor

from nngeom.analysis import SuperNat

PAGE = "analysis.md"
STEPS, D, N = 300, 10, 50
METHODS = {"gradient descent": None, "SuperNat, kappa = max": "max", "SuperNat, kappa = trace": "trace"}
SEEN = sorted({round(STEPS ** (j / 40)) for j in range(41)})  # steps after which errors are kept


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels to train on, features and signal to test on."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    signal, noise = draw(N), draw(N, D) / D**0.5
    y = signal + noise @ (noise.T @ (0.1**0.5 * draw(N)))
    test, other = draw(1000), draw(1000, D) / D**0.5
    return torch.cat([signal[:, None], noise], 1), y, torch.cat([test[:, None], other], 1), test


def run(name: str, seed: int) -> dict[str, Any]:
    """Test errors after the steps of ``SEEN``; of the first seed the squared singular values, over the largest."""
    x, y, xt, yt = problem(seed)
    model, errors, values = SuperNat(x, y, 0.5, METHODS[name]), [], []
    first = model.singular_values.square().max()
    for step in range(1, STEPS + 1):
        model.step()
        if step in SEEN:
            errors.append(float((xt @ model.weights - yt).square().mean()))
            values.append(model.singular_values.square() / first)
    return {"error": errors, "values": [] if seed else torch.stack(values)}


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A method a row."""
    rows = []
    for name in METHODS:
        errors = np.array([r["error"] for r in seeds_of(cells, name)])
        lowest = int(errors.mean(0).argmin())
        error = errors[:, -1].std() / len(errors) ** 0.5
        rows.append([name, f"{errors[:, -1].mean():.3f} ± {error:.3f}", spread(errors[:, lowest]), str(SEEN[lowest])])
    head = ["method", f"test error at step {STEPS} ± its standard error", "where the mean is lowest", "at step"]
    return {"supernat": table(head, rows)}


def draw(cells: dict[str, Any], path: Path) -> None:
    """Errors along training; singular values of one draw."""
    fig, axes = figure(1, 3, 11, 3.2)
    for colour, name in zip(COLOURS, METHODS):
        band(axes[0, 0], SEEN, [r["error"] for r in seeds_of(cells, name)], name, colour)
    axes[0, 0].set(title="test error against the signal", xlabel="step", yscale="log", xscale="log")
    axes[0, 0].legend(fontsize=7.5)
    for ax, name in zip(axes[0, 1:], METHODS):
        values = np.array(seeds_of(cells, name)[0]["values"]).clip(1e-12)
        ax.plot(SEEN, values, color="#999999", lw=1)
        ax.plot(SEEN, values[:, 0], color=COLOURS[1], lw=2, label="signal")
        ax.set(title=f"squared singular values\n{name}", xlabel="step", xscale="log", yscale="log", ylim=(1e-8, 2))
    axes[0, 1].legend(fontsize=7.5)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All seeds, one table, one figure."""
    args = options(__doc__, argv, seeds=40)
    cells = Cells(args, "supernat")
    for seed in range(args.seeds):
        for name in METHODS:
            cells.add(f"{name}/{seed}", lambda m=name, s=seed: run(m, s))
    draw(cells.cells, args.out / "images" / "supernat.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
