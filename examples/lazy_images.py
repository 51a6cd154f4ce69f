"""Lazy and hasty training of a VGG-like net by minibatches: wrong labels on MNIST, and the learning rate as a control.

    python examples/lazy_images.py [--data FOLDER] [--seeds 3] [--quick]

500 MNIST digits of 14 x 14, 15 % of the labels wrong; six convolutions of 8 to 32 channels and two linear layers, no
normalisation, He's initialisation, float64; SGD with momentum 0.9, batches of 50, learning rate 0.01 / alpha^2, from
one start with alpha = 0.5, 1 and 100; at alpha = 1 also with learning rates 0.003 and 0.001. Runs are compared at equal
loss of the clean examples.

Protocol: George 2023, thesis, section 5.3.2, appendices C.5 and C.6 (there ResNet-18 and VGG-11 on CIFAR-10).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from geometry_common import Data, band, figure
from lazy_common import COLOURS, save
from lazy_minibatches import ALPHAS, at, descend, right, together
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread
from papers_nets import images, vgg
from torch import nn
from torch.nn import functional as F

from nngeom.linearized import flip_labels, groups_by_flag

PAGE = "linearized.md"
RATE = 0.01
RUNS = {f"alpha {alpha:g}": (alpha, RATE) for alpha in ALPHAS}
RUNS |= {f"alpha 1, rate {lr:g}": (1.0, lr) for lr in (0.003, 0.001)}
SHADES = dict(zip(RUNS, [*COLOURS.values(), "#E69F00", "#8B4513"]))
LEVELS = (1.5, 1.0, 0.7, 0.4, 0.2, 0.1)


def network(shape: tuple[int, int, int], width: int, seed: int) -> nn.Sequential:
    """The VGG-like net without normalisation."""
    torch.manual_seed(seed)
    model = vgg(shape, width, lambda channels: nn.Identity())
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model.double()


def run(data: Data, alpha: float, lr: float, args: argparse.Namespace, seed: int) -> dict[str, list[float]]:
    """The curves of one run."""
    y, wrong = flip_labels(data.y, 0.15, 10, torch.Generator().manual_seed(seed))
    groups = groups_by_flag(wrong, ("clean", "noisy"))

    def measure(scaled: nn.Module, outputs: torch.Tensor) -> dict[str, Any]:
        test, each = scaled(data.x_test), F.cross_entropy(outputs, y, reduction="none")
        accuracies = {f"{k}_right": v for k, v in groups.means(right(outputs, y)).items()}
        accuracies["test_right"] = right(test, data.y_test).mean()
        return {**groups.means(each), **accuracies, "test": F.cross_entropy(test, data.y_test)}

    model = network(data.shape, args.width, seed)
    return descend(
        model, alpha, data.x, y, measure, lr=lr, steps=args.steps, until=0.03, seed=seed, batch=50, probe=args.probe
    )


def number(values: list[float]) -> str:
    """Mean and deviation, where all runs got there."""
    return "-" if any(math.isnan(v) for v in values) else spread(values, ".2f")


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """At equal loss of the clean examples; and at the end of the runs."""
    names = [name for name in RUNS if seeds_of(cells, name)]
    found = {name: [at(r, "clean", LEVELS) for r in seeds_of(cells, name)] for name in names}
    rows = []
    for key, shown in {"noisy": "wrong labels", "test": "test"}.items():
        for name in names:
            rows.append([shown, name, *(number([float(f[key][j]) for f in found[name]]) for j in range(len(LEVELS)))])
    head = ["loss of", "run", *(f"clean {level:g}" for level in LEVELS)]
    ends = []
    for name in names:
        runs = seeds_of(cells, name)
        row = [name, f"{mean([r['step'][-1] for r in runs]):.0f}", spread([r["loss"][-1] for r in runs])]
        row += [spread([min(r["test"]) for r in runs]), spread([max(r["test_right"]) for r in runs])]
        ends.append([*row, *(spread([r[key][-1] for r in runs]) for key in ("noisy_right", "kernel", "signs"))])
    last = ["run", "steps", "training loss", "lowest test loss", "highest test accuracy", "wrong labels learned"]
    return {
        "lazy_images": table(head, rows),
        "lazy_images_ends": table([*last, "kernel alignment", "signs kept"], ends),
    }


def draw(cells: dict[str, Any], path: Path) -> None:
    """Wrong labels, test and linearity against the clean loss, for alphas to the left, learning rates to the right."""
    fig, axes = figure(4, 2, 8.5, 10.5)
    titles = {"noisy": "loss of wrong labels", "test": "loss on the test", "test_right": "test accuracy"}
    titles["kernel"] = "kernel alignment with the start"
    for row, names in zip(axes.T, (list(RUNS)[:3], [list(RUNS)[1], *list(RUNS)[3:]])):
        for name in names:
            levels, curves = together(seeds_of(cells, name), "clean")
            for ax, key in zip(row, titles):
                band(ax, levels, curves[key], name, SHADES[name])
        for ax, title in zip(row, titles.values()):
            ax.set(title=title, xlabel="loss of the clean examples", xscale="log")
            ax.invert_xaxis()
        row[0].legend(fontsize=8)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All runs, two tables, one figure."""
    args = options(__doc__, argv, seeds=3, steps=1500, images=500, width=8, probe=40)
    if args.quick:
        args.steps, args.images, args.width, args.probe = 5, 50, 4, 10
    found = images(args.data, args.images, 50 if args.quick else 500)
    small = lambda x: (F.avg_pool2d(x, 2) if found.shape[1] > 20 else x).double()
    data = Data(small(found.x), found.y, small(found.x_test), found.y_test)
    cells = Cells(args, "lazy_images", steps=args.steps, images=args.images, width=args.width)
    for seed in range(args.seeds):
        for name, (alpha, lr) in RUNS.items():
            cells.add(f"{name}/{seed}", lambda a=alpha, r=lr, s=seed: run(data, a, r, args, s))
    draw(cells.cells, args.out / "images" / "lazy_images.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
