"""EKFAC under three rules of damping: a fixed one, Levenberg-Marquardt, and by the variance of the examples.

A classifier (64-64-32-10, tanh, batches of 25) and the small auto-encoder (see ``autoencoder_of_digits``, batches of
100) on the 8 x 8 digits, the last 500 of which are not trained on. Every rule has 12 settings (4 learning rates, 3
dampings to start from) on one seed, chosen by the training loss; the best is run on three. Steps are not bounded.

    python examples/optimizer_damping.py            # docs/data/damping.json
    python examples/optimizer_damping.py --steps 50
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from autoencoder_of_digits import autoencoder
from autoencoder_of_digits import loss_of as half_squares
from optimizer_race import DOCS, SEEDS
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

RATES, DAMPINGS = (0.03, 0.1, 0.3, 1.0), (1e-3, 1e-2, 1e-1)
RULES: dict[str, Callable[[float], object]] = {
    "fixed": lambda x: nng.FactoredTikhonov(x, balanced=False),
    "Levenberg-Marquardt": lambda x: nng.optim.LevenbergMarquardt(initial=x),
    "variance": lambda x: nng.optim.VarianceDamping(x),
}
Task = tuple[Callable[[int], nn.Module], Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, int]


def classifier(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def tasks() -> dict[str, Task]:
    """Model of a seed, loss, inputs, targets, examples a batch."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    inputs, labels = torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]
    return {
        "classifier": (classifier, F.cross_entropy, inputs, labels, 25),
        "auto-encoder": (autoencoder, half_squares, inputs, inputs, 100),
    }


def train(task: Task, rule: str, lr: float, damping: float, seed: int, steps: int) -> dict:
    """The loss of the training set and of the rest at the end, and the processor time of the steps."""
    make, loss, x, y, batch = task
    model, spent = make(seed), 0.0
    options = dict(momentum=0.0, kl_clip=None, scalings="batch", basis_every=20)
    opt = nng.optim.EKFAC(model, lr, damping=RULES[rule](damping), **options)
    generator = torch.Generator().manual_seed(1000 + seed)
    for _ in range(steps):
        index = torch.randint(len(x) - 500, (batch,), generator=generator)
        start = time.process_time()
        opt.zero_grad()
        with opt.observe():
            loss(model(x[index]), y[index]).backward()
        opt.step(evaluate=lambda index=index: loss(model(x[index]), y[index]))
        spent += time.process_time() - start
    with torch.no_grad():
        inside, outside = (float(loss(model(x[part]), y[part])) for part in (slice(None, -500), slice(-500, None)))
    finite = math.isfinite(inside + outside)
    return {"training": inside if finite else None, "rest": outside if finite else None, "seconds": round(spent, 2)}


def judge(task: Task, rule: str, steps: int) -> dict:
    """Every setting on the first seed, the best on all."""
    tried = {(lr, x): train(task, rule, lr, x, SEEDS[0], steps) for lr in RATES for x in DAMPINGS}
    lr, x = min(tried, key=lambda key: math.inf if tried[key]["training"] is None else tried[key]["training"])
    runs = [tried[lr, x]] + [train(task, rule, lr, x, seed, steps) for seed in SEEDS[1:]]
    return {"lr": lr, "damping": x, "runs": runs, "tried": [[*key, run["training"]] for key, run in tried.items()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="where data/damping.json goes")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path, table = options.out / "data" / "damping.json", {"steps": options.steps}
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, task in tasks().items():
        table[name] = {}
        for rule in RULES:
            table[name][rule] = judge(task, rule, options.steps)
            path.write_text(json.dumps(table, indent=1))
            best = table[name][rule]
            print(f"{name:14s} {rule:20s} {best['lr']}, {best['damping']}: {best['runs']}", flush=True)


if __name__ == "__main__":
    main()
