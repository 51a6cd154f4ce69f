"""Model Gradient Similarity on two circles with wrong labels: boundaries of all methods, and both metrics along them.

    python examples/mgs_circles.py [--seeds 3] [--quick]

150 points of two noisy circles, 15 % of the labels flipped, a ReLU net of three hidden layers of 64, full batch, SGD
0.1 with momentum 0.9 (Adam its own), 1500 steps. The strengths are fixed by hand, as the figure of the paper is one of
shapes. Accuracy is on 500 clean points; metrics are of the kernel on all 150.

Protocol: Szolnoky et al. 2022, figures 2 and A.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_common import band, figure, mlp
from lazy_common import save
from mgs_common import COLOUR, Recipe, measured, train
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from torch import Tensor
from torch.nn import functional as F

PAGE = "mgs.md"
STRENGTHS = {
    "none": 0.0,
    "dropout": 0.2,
    "weight decay": 3e-3,
    "cyclical rate": 0.2,
    "Adam": 1e-3,
    "loss gradient, parameters": 0.1,
    "loss gradient, inputs": 1.0,
    "MGS": 3e-3,
    "MGS, log det": 0.03,
}
COLOURS = {**COLOUR, "MGS, log det": "#8B0000"}
SIDE, REACH = 60, 1.8


def circles(count: int, noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points, labels ``(count, 1)`` of which a share is flipped, and which are."""
    from sklearn.datasets import make_circles

    x, y = make_circles(count, noise=0.2, factor=0.4, random_state=seed)
    flipped = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < noise
    labels = torch.tensor(y) ^ flipped
    return torch.tensor(x, dtype=torch.float32), labels.float()[:, None], flipped


def run(method: str, strength: float, steps: int, seed: int) -> dict[str, Any]:
    """Accuracy and metrics along one training, and the probabilities on a grid at its end."""
    (x, y, _), (x_test, y_test, _) = circles(150, 0.15, seed), circles(500, 0.0, 1000 + seed)
    torch.manual_seed(seed)
    recipe = Recipe(method, strength, F.binary_cross_entropy_with_logits, steps, len(x), 0.1)
    model, found = mlp(2, 64, 3, 1, recipe.dropout), {"step": [], "accuracy": [], "trace": [], "log": [], "rank": []}

    def visit(step: int) -> None:
        model.eval()
        with torch.no_grad():
            found["accuracy"].append(float(((model(x_test) > 0) == y_test).float().mean()))
        now = measured(model, x)
        for name, value in {"step": step, **{key: now[key] for key in ("trace", "log", "rank")}}.items():
            found[name].append(value)

    train(model, x, y, recipe, visit, seed=seed, points=20)
    axis = torch.linspace(-REACH, REACH, SIDE)
    with torch.no_grad():
        grid = model(torch.cartesian_prod(axis, axis)).sigmoid().view(SIDE, SIDE) if seed == 0 else None
    return {**found, "grid": grid if grid is None else (100 * grid).round().int()}


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A method a row."""
    rows = []
    for method, strength in STRENGTHS.items():
        runs = seeds_of(cells, method)
        row = [f"{method}{f', {strength:g}' if strength else ''}", spread([r["accuracy"][-1] for r in runs])]
        row.append(f"{np.mean([r['accuracy'] for r in runs], 0).max():.3g}")
        rows.append([*row, *(spread([r[key][-1] for r in runs]) for key in ("trace", "log", "rank"))])
    head = ["method, strength", "accuracy, end", "highest", "mean eigenvalue", "mean log eigenvalue", "effective rank"]
    return {"mgs_circles": table(head, rows)}


def draw(cells: dict[str, Any], path: Path) -> None:
    """Boundaries of the first seed above, accuracy and metrics along training below."""
    fig, axes = figure(5, 3, 8.8, 13.5)
    curves = axes[3:].flatten()
    x, y, flipped = circles(150, 0.15, 0)
    axis = np.linspace(-REACH, REACH, SIDE)
    for ax, (method, found) in zip(axes[:3].flat, ((m, cells[f"{m}/0"]) for m in STRENGTHS)):
        values = np.array(found["grid"]).T / 100
        ax.contourf(axis, axis, values, levels=np.linspace(0, 1, 11), cmap="RdBu_r", alpha=0.8)
        edges = np.where(flipped, "black", "white")
        ax.scatter(*x.T, c=y[:, 0], cmap="RdBu_r", edgecolors=edges, s=13, linewidths=0.7)
        ax.set(title=f"{method}: {found['accuracy'][-1]:.3f}", xticks=[], yticks=[])
    titles = {"accuracy": "accuracy, clean", "trace": "mean eigenvalue", "log": "mean log eigenvalue"}
    titles["rank"] = "effective rank"
    for ax, (key, title) in zip(curves, titles.items()):
        for method, colour in COLOURS.items():
            runs = seeds_of(cells, method)
            band(ax, runs[0]["step"], [r[key] for r in runs], method, colour)
        ax.set(title=title, xlabel="step", yscale="log" if key == "trace" else "linear")
    curves[4].legend(*curves[0].get_legend_handles_labels(), fontsize=8.5, loc="center")
    for ax in curves[4:]:
        ax.axis("off")
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All methods, one table, one figure."""
    args = options(__doc__, argv, steps=1500)
    if args.quick:
        args.steps = 20
    cells = Cells(args, "mgs_circles", steps=args.steps)
    for seed in range(args.seeds):
        for method, strength in STRENGTHS.items():
            cells.add(f"{method}/{seed}", lambda m=method, s=strength, k=seed: run(m, s, args.steps, k))
    draw(cells.cells, args.out / "images" / "mgs_circles.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
