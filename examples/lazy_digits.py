"""Easy groups first, and more so in feature learning: wrong labels, difficulty deciles and a spurious feature on
digits.

    python examples/lazy_digits.py [--seeds 3] [--workers 2] [--only scores]

A small residual network (64-64, two residual ReLU blocks, 10 outputs, 13 000 parameters, float64), full-batch gradient
descent (learning rate 0.05, momentum 0.9), from one start with alpha = 0.5, 1 and 100:

    noise      500 digits, 15 % of the labels wrong; loss of clean and of noisy examples and of 1000 test digits,
               compared at equal loss of the clean examples; again at alpha = 1 with learning rates 0.01 and 0.003
    scores     600 digits in ten groups by C-scores (ridge classifiers, 5 subset sizes, 40 models each),
               compared at equal training loss
    spurious   600 digits, class "5 or more", one more column +-0.1 + N(0, 0.3^2) that agrees with the label for 95 %;
               accuracy where it does and where it does not, in training and on a balanced test set

Finished runs are kept in out/lazy_digits/. Writes out/lazy_digits.png. Protocol: George 2023, thesis, section
5.3.2-5.3.3.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from lazy_common import descend
from lazy_digits_figure import draw, report
from sklearn.datasets import load_digits
from torch import nn
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

LEARNING_RATE = 0.05
SLOW = {"noise at 0.01": 0.01, "noise at 0.003": 0.003}  # controls at alpha = 1: is it the size of the steps?
# Where a run may stop: a training loss, or a number of steps.
LIMITS = {
    "noise": (0.03, 15000),
    "scores": (0.04, 6000),
    "spurious": (0.03, 6000),
    **dict.fromkeys(SLOW, (0.03, 15000)),
}
ALPHAS = {name: (1.0,) if name in SLOW else (0.5, 1.0, 100.0) for name in LIMITS}
OUT = Path("out/lazy_digits")


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


def cross_entropy(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``(n,)``."""
    return F.cross_entropy(outputs, y, reduction="none")


def right(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``(n,)``: 1 where the prediction is ``y``."""
    return (outputs.argmax(1) == y).double()


def experiment(name: str, seed: int):
    """``(train inputs, train labels, number of outputs, measure)``; ``measure(scaled, example losses)`` gives the
    curves.
    """
    g = torch.Generator().manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=g)
    x, y = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
    n = 500 if name.startswith("noise") else 600
    x, test_x, y, test_y = x[:n], x[n : n + 1000], y[:n], y[n : n + 1000]
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
        scores = c_scores(x, y, [20, 40, 80, 160, 320], 40, seed=seed).score
        groups = groups_by_score(scores, 10)
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


def one_run(job: tuple[str, int, float], *, quick: bool) -> tuple[tuple[str, int, float], dict[str, np.ndarray]]:
    """The curves of one run, from its file where it is finished."""
    name, seed, alpha = job
    path = OUT / f"{name}-{seed}-{alpha:g}{'-quick' if quick else ''}.npz".replace(" ", "_")
    if not path.exists():
        torch.set_num_threads(1)
        x, y, outputs, measure = experiment(name, seed)
        torch.manual_seed(seed)
        model = Residual(x.shape[1], 64, outputs).double()
        probe = [(x[:60], y[:60])]

        def everything(scaled, each):
            now = linearity(scaled, None, probe)
            likeness = {
                "signs": now.sign_similarity,
                "kernel": now.kernel_alignment,
                "representation": now.representation_alignment,
            }
            return {**measure(scaled, each), **likeness}

        until, steps = LIMITS[name]
        steps = min(steps, 200) if quick else steps
        lr = SLOW.get(name, LEARNING_RATE)
        run = descend(model, alpha, x, y, cross_entropy, everything, lr=lr, every=0.05, until=until, steps=steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **{k: v.numpy() for k, v in run.items()})
        print(
            f"{name} seed {seed} alpha {alpha:g}: {int(run['step'][-1])} steps, training loss "
            f"{float(run['loss'][-1]):.3f}",
            flush=True,
        )
    return job, dict(np.load(path))


def main() -> None:
    """All runs, the table, the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", choices=list(LIMITS))
    parser.add_argument("--quick", action="store_true", help="200 steps with the spurious feature, no figure")
    parser.add_argument("--figure", type=Path, default=Path("out/lazy_digits.png"))
    args = parser.parse_args()
    args.only = "spurious" if args.quick else args.only
    names = [args.only] if args.only else list(LIMITS)
    run = partial(one_run, quick=args.quick)
    jobs = [(name, seed, alpha) for name, seed in product(names, range(args.seeds)) for alpha in ALPHAS[name]]
    if args.workers > 1:
        with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            runs = dict(pool.map(run, jobs))
    else:
        runs = dict(map(run, jobs))
    report(runs)
    if not args.only:
        draw(args.figure, runs)


if __name__ == "__main__":
    main()
