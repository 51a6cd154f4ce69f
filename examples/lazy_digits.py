"""Lazy and hasty training of a residual network on digits: difficulty, wrong labels, a spurious feature.

    python examples/lazy_digits.py [--data FOLDER] [--seeds 3] [--quick]

Scikit-learn's 8 x 8 digits, a residual network (64-64, two residual ReLU blocks, 10 outputs, 13 000 parameters,
float64), full-batch gradient descent (learning rate 0.05, momentum 0.9), from one start with alpha = 0.5, 1 and 100:

    noise      500 digits, 15 % of the labels wrong; loss of clean and of noisy examples and of 1000 test digits,
               compared at equal loss of the clean examples; again at alpha = 1 with learning rates 0.01 and 0.003
    scores     600 digits in ten groups by C-scores (ridge classifiers, 5 subset sizes, 40 models each),
               compared at equal training loss
    spurious   600 digits, class "5 or more", one more column +-0.1 + N(0, 0.3^2) that agrees with the label for 95 %;
               accuracy where it does and where it does not, in training and on a balanced test set

Protocol: George 2023, thesis, section 5.3.2-5.3.3.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from geometry_common import load
from lazy_common import descend
from lazy_digits_figure import ALPHAS, SLOW, draw, tables
from lazy_minibatches import right
from papers_common import Cells, options, place
from torch import Tensor, nn
from torch.nn import functional as F

from nngeom.linearized import (
    add_spurious_feature,
    c_scores,
    flip_labels,
    groups_by_attribute,
    groups_by_flag,
    groups_by_score,
    linearity,
)

PAGE = "linearized.md"
LEARNING_RATE = 0.05
# Where a run may stop: a training loss, or a number of steps.
LIMITS = {
    "noise": (0.03, 15000),
    "scores": (0.04, 6000),
    "spurious": (0.03, 6000),
    **dict.fromkeys(SLOW, (0.03, 15000)),
}


class Residual(nn.Module):
    """``x + relu(W x + b)`` blocks between two linear maps."""

    def __init__(self, inputs: int, width: int, outputs: int, blocks: int = 2):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        h = F.relu(self.first(x))
        for block in self.blocks:
            h = h + F.relu(block(h))
        return self.last(h)


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """``(n,)``."""
    return F.cross_entropy(outputs, y, reduction="none")


def experiment(name: str, seed: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, int, Any]:
    """``(train inputs, train labels, number of outputs, measure)``; ``measure(scaled, example losses)`` gives the
    curves.
    """
    g = torch.Generator().manual_seed(seed)
    n = 500 if name.startswith("noise") else 600
    data = load(args.data, n, 1000, seed)
    x, y, test_x, test_y = data.x.flatten(1).double(), data.y, data.x_test.flatten(1).double(), data.y_test
    outputs = 10
    if name.startswith("noise"):
        y, flag = flip_labels(y, 0.15, 10, g)
        groups = groups_by_flag(flag)
        measure = lambda scaled, each: {
            **groups.means(each),
            **{f"{k}_right": v for k, v in groups.means(right(scaled(x), y)).items()},
            "test": cross_entropy(scaled(test_x), test_y).mean(),
            "test_right": right(scaled(test_x), test_y).mean(),
        }
    elif name == "scores":
        sizes, models = ([20, 40], 3) if args.quick else ([20, 40, 80, 160, 320], 40)
        groups = groups_by_score(c_scores(x, y, sizes, models, seed=seed).score, 10)
        measure = lambda scaled, each: groups.means(each)
    else:
        outputs, y, test_y = 2, (y >= 5).long(), (test_y >= 5).long()
        x, attribute = add_spurious_feature(x, y, 0.95, 0.1, 0.3, g)
        test_x, test_attribute = add_spurious_feature(test_x, test_y, 0.5, 0.1, 0.3, g)
        groups, test_groups = groups_by_attribute(y, attribute), groups_by_attribute(test_y, test_attribute)
        measure = lambda scaled, each: {
            **groups.means(right(scaled(x), y)),
            **{f"test_{k}": v for k, v in test_groups.means(right(scaled(test_x), test_y)).items()},
        }
    return x, y, outputs, measure


def run(name: str, alpha: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The curves of one run."""
    x, y, outputs, measure = experiment(name, seed, args)
    torch.manual_seed(seed)
    model = Residual(x.shape[1], 64, outputs).double()
    count = 10 if args.quick else 60
    probe = [(x[:count], y[:count])]

    def everything(scaled: nn.Module, each: Tensor) -> dict[str, Any]:
        now = linearity(scaled, None, probe)
        likeness = {"signs": now.sign_similarity, "kernel": now.kernel_alignment}
        return {**measure(scaled, each), **likeness, "representation": now.representation_alignment}

    until, steps = LIMITS[name]
    steps = 30 if args.quick else steps
    lr = SLOW.get(name, LEARNING_RATE)
    return dict(descend(model, alpha, x, y, cross_entropy, everything, lr=lr, every=0.1, until=until, steps=steps))


def fill(args: argparse.Namespace, cells: Cells) -> None:
    """All runs, a seed after the other."""
    for seed in range(args.seeds):
        for name in LIMITS:
            for alpha in (1.0,) if name in SLOW else ALPHAS:
                compute = lambda n=name, a=alpha, s=seed: run(n, a, s, args)
                cells.add(f"{name}/{alpha:g}/{seed}", compute)


def main(argv: list[str] | None = None) -> None:
    """All runs, four tables, one figure."""
    args = options(__doc__, argv)
    cells = Cells(args, "lazy_digits")
    fill(args, cells)
    draw(cells.cells, args.out / "images" / "lazy_digits.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
