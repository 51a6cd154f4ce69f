"""Model Gradient Similarity on a residual net with group normalisation under Adam: does the penalty still act?

    python examples/mgs_residual.py [--data FOLDER] [--seeds 3] [--quick]

500 MNIST digits of 14 x 14, 40 % of the labels flipped, the residual net with 8 to 32 channels (44 000 parameters),
Adam 0.002, 20 epochs of batches of 32. No regulariser, weight decay, the gradient of the loss, the trace of the kernel,
at all strengths that were tried. Metrics are of the kernel on 20 training images.

Protocol: Szolnoky et al. 2022, whose nets have no normalisation; here weights before one can grow without effect.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, Data, accuracy, band, corrupt, figure
from lazy_common import save
from mgs_common import Recipe, measured, train
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread
from papers_nets import images, network
from torch.nn import functional as F

PAGE = "mgs.md"
TRIED = {
    "none": (0.0,),
    "weight decay": (1e-3, 1e-2),
    "loss gradient, parameters": (0.05, 0.2),
    "MGS": (1e-4, 1e-3, 1e-2),
}


def run(data: Data, method: str, strength: float, epochs: int, seed: int) -> dict[str, Any]:
    """Accuracy along one training, on the test and on the flipped labels, and the metrics at both ends."""
    y = corrupt(data.y, 0.4, torch.Generator().manual_seed(seed))
    model = network("resnet-gn", data.shape, seed, 8)
    found: dict[str, Any] = {"epoch": [], "accuracy": [], "memorised": [], "metrics": []}
    wrong = y != data.y

    def visit(epoch: int) -> None:
        found["epoch"].append(epoch)
        found["accuracy"].append(accuracy(model, data.x_test, data.y_test))
        found["memorised"].append(accuracy(model, data.x[wrong], y[wrong]))
        found["metrics"].append(measured(model, data.x[:20]))

    recipe = Recipe(method, strength, epochs=epochs, lr=2e-3, optimizer="Adam")
    train(model, data.x, y, recipe, visit, seed=seed, points=10)
    return found


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A strength a row."""
    rows = []
    for name in dict.fromkeys(key.rpartition("/")[0] for key in cells):
        runs, (method, strength) = seeds_of(cells, name), name.split("/")
        highest = np.mean([r["accuracy"] for r in runs], 0).max()
        row = [f"{method}{f', {float(strength):g}' if method != 'none' else ''}"]
        row += [spread([100 * mean(r["accuracy"][-3:]) for r in runs]) + f" ({100 * highest:.1f})"]
        row += [spread([100 * r["memorised"][-1] for r in runs])]
        ends = [r["metrics"][-1] for r in runs]
        rows.append([*row, *(spread([e[key] for e in ends]) for key in ("trace", "log", "rank", "cosine"))])
    head = ["method, strength", "test accuracy, end", "flipped labels memorised", "mean eigenvalue"]
    return {"mgs_residual": table([*head, "mean log eigenvalue", "effective rank", "cosine"], rows)}


def draw(cells: dict[str, Any], path: Path) -> None:
    """Accuracy and metrics along training; darker is stronger."""
    fig, axes = figure(2, 2, 8.5, 6.6)
    axes = axes.reshape(1, 4)
    for colour, (method, strengths) in zip(COLOURS, TRIED.items()):
        for style, strength in zip(("-", "--", ":"), strengths[::-1]):
            runs = seeds_of(cells, f"{method}/{strength}")
            x, label = runs[0]["epoch"], f"{method}{f', {strength:g}' if strength else ''}"
            band(axes[0, 0], x, [r["accuracy"] for r in runs], label, colour, ls=style)
            band(axes[0, 1], x, [r["memorised"] for r in runs], "", colour, ls=style)
            for ax, key in zip(axes[0, 2:], ("trace", "rank")):
                band(ax, x, [[m[key] for m in r["metrics"]] for r in runs], "", colour, ls=style)
    for ax, title in zip(axes[0], ("test accuracy", "flipped labels memorised", "mean eigenvalue", "effective rank")):
        ax.set(title=title, xlabel="epoch", yscale="log" if title == "mean eigenvalue" else "linear")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All strengths, one table, one figure."""
    args = options(__doc__, argv, epochs=20, images=500)
    if args.quick:
        args.epochs, args.images = 1, 40
    found = images(args.data, args.images, 500)
    small = lambda x: F.avg_pool2d(x, 2) if found.shape[1] > 20 else x
    data = Data(small(found.x), found.y, small(found.x_test), found.y_test)
    cells = Cells(args, "mgs_residual", epochs=args.epochs, images=args.images)
    for seed in range(args.seeds):
        for method, strengths in TRIED.items():
            for strength in strengths:
                compute = lambda m=method, s=strength, k=seed: run(data, m, s, args.epochs, k)
                cells.add(f"{method}/{strength}/{seed}", compute)
    draw(cells.cells, args.out / "images" / "mgs_residual.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
