"""Geometric complexity before and after training, against depth and initialisation.

    python examples/complexity_of_depth.py [--data FOLDER] [--seeds 3] [--quick]

ReLU nets of 1 to 8 hidden layers of 100 on MNIST, under PyTorch's initialisation, Glorot's and He's (both without
biases at the start): the mean squared Frobenius norm of the input Jacobian of the logits on 200 test images, untrained
and after 300 steps of SGD (0.02, momentum 0.9, batches of 100).

Protocol: Walker 2023, section 6.3; Dherin et al. 2022, figure 2.
"""

from __future__ import annotations

from typing import Any

import torch
from geometry_common import COLOURS, Data, accuracy, band, figure, mlp
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from papers_nets import descend, images
from torch import nn

from nngeom import analysis

PAGE = "papers.md"
DEPTHS = (1, 2, 3, 4, 6, 8)
STARTS = ("PyTorch", "Glorot", "He")


def net(start: str, inputs: int, depth: int, seed: int) -> nn.Sequential:
    """A ReLU net with weights drawn as its initialisation says."""
    torch.manual_seed(seed)
    model = mlp(inputs, 100, depth)
    for layer in model if start != "PyTorch" else ():
        if isinstance(layer, nn.Linear):
            if start == "He":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def run(data: Data, start: str, depth: int, steps: int, seed: int) -> dict[str, float]:
    """Both complexities of one net, and its accuracy."""
    model = net(start, data.x[0].numel(), depth, seed)
    measure = lambda: float(analysis.geometric_complexity(model, [data.x_test[:200]]))
    before = measure()
    descend(model, data.x, data.y, lambda step: None, steps=steps, lr=0.02, seed=seed)
    return {"before": before, "after": measure(), "accuracy": accuracy(model, data.x_test, data.y_test)}


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A row a start and moment, a column a depth."""
    rows = []
    for start in STARTS:
        for key in ("before", "after", "accuracy"):
            runs = [seeds_of(cells, f"{start}/{depth}") for depth in DEPTHS]
            rows.append([f"{start}, {key}", *(spread([r[key] for r in line], ".2g") for line in runs)])
    return {"complexity_of_depth": table(["hidden layers", *map(str, DEPTHS)], rows)}


def draw(cells: dict[str, Any], path: Any) -> None:
    """Complexity against depth, before and after training."""
    fig, axes = figure(1, 2, 8.5, 3.4, sharey=True)
    for ax, key in zip(axes[0], ("before", "after")):
        for colour, start in zip(COLOURS, STARTS):
            runs = [seeds_of(cells, f"{start}/{depth}") for depth in DEPTHS]
            points = list(zip(*[[r[key] for r in line] for line in runs]))
            band(ax, DEPTHS, points, start, colour, marker="o", ms=3)
        ax.set(title=f"{key} training", xlabel="hidden layers", yscale="log", xticks=DEPTHS)
    axes[0, 0].set(ylabel="geometric complexity")
    axes[0, 0].legend(fontsize=8)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All runs, one table, one figure."""
    args = options(__doc__, argv, steps=300, examples=2000)
    if args.quick:
        args.steps, args.examples = 2, 60
    data = images(args.data, args.examples, 20 if args.quick else 1000)
    cells = Cells(args, "complexity_of_depth", steps=args.steps, examples=args.examples)
    for seed in range(args.seeds):
        for start in STARTS:
            for depth in DEPTHS:
                one = lambda i=start, d=depth, s=seed: run(data, i, d, args.steps, s)
                cells.add(f"{start}/{depth}/{seed}", one)
    draw(cells.cells, args.out / "images" / "complexity_of_depth.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
