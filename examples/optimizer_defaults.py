"""Small tasks, 20 epochs: EKFAC and KFAC as they come, with other numbers, Adam as it comes, SGD with momentum at its
best learning rate.

    python examples/optimizer_defaults.py        # docs/data/defaults.json, and the table on the screen

Losses are those of the training set after 20 epochs, means over three seeds. SGD's rate is chosen on the first seed
among nine, per task: the others are not tuned.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from autoencoder_of_digits import autoencoder, loss_of
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

DOCS = Path(__file__).parent.parent / "docs"
EPOCHS, SEEDS = 20, (0, 1, 2)
RATES = [10 ** (-3 + 0.5 * j) for j in range(9)]


@dataclass(frozen=True)
class Problem:
    """A task: model by seed, loss of outputs and targets, data, batch size."""

    model: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    data: tuple[Tensor, Tensor]
    batch: int


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> Callable[[int], nn.Module]:
    """A fully connected network with PyTorch's initialisation."""

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), activation()]
        return nn.Sequential(*layers[:-1])

    return make


def conv_net(seed: int) -> nn.Module:
    """Two convolutions and a linear layer for 8 x 8 images."""
    torch.manual_seed(seed)
    first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )


def problems() -> dict[str, Problem]:
    """The five tasks on which the defaults were chosen, then three others; inputs standardised, regression targets
    too.
    """
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine

    def standard(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / x.std(0)

    def classes(data: Any) -> tuple[Tensor, Tensor]:
        return standard(torch.tensor(data.data).float()), torch.tensor(data.target)

    d, t = load_digits(), load_diabetes()
    pixels = torch.tensor(d.data / 16, dtype=torch.float32)
    labels = torch.tensor(d.target)
    squared = lambda f, y: 0.5 * (f - y).square().sum(1).mean()
    return {
        "auto-encoder": Problem(autoencoder, loss_of, (pixels, pixels), 200),
        "digits, conv net": Problem(conv_net, F.cross_entropy, (pixels, labels), 128),
        "digits, MLP": Problem(mlp(64, 64, 64, 10), F.cross_entropy, (pixels, labels), 128),
        "diabetes, MLP": Problem(
            mlp(10, 32, 32, 1),
            squared,
            (standard(torch.tensor(t.data).float()), standard(torch.tensor(t.target).float()[:, None])),
            64,
        ),
        "breast cancer, MLP": Problem(mlp(30, 32, 32, 2), F.cross_entropy, classes(load_breast_cancer()), 64),
        "wine, MLP": Problem(mlp(13, 32, 32, 3), F.cross_entropy, classes(load_wine()), 32),
        "iris, MLP": Problem(mlp(4, 32, 32, 3), F.cross_entropy, classes(load_iris()), 32),
        "digits, tanh MLP": Problem(mlp(64, 64, 10, activation=nn.Tanh), F.cross_entropy, (pixels, labels), 128),
    }


def train(problem: Problem, make: Callable[[nn.Module], torch.optim.Optimizer], seed: int) -> float:
    """The training loss after the last epoch; infinite where it diverged."""
    model, (x, y) = problem.model(seed), problem.data
    opt, order = make(model), torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x), generator=order).split(problem.batch):
            opt.zero_grad()
            if isinstance(opt, nng.optim.NaturalGradient):
                with opt.observe():
                    problem.loss(model(x[index]), y[index]).backward()
            else:
                problem.loss(model(x[index]), y[index]).backward()
            opt.step()
    with torch.no_grad():
        value = float(problem.loss(model(x), y))
    return value if math.isfinite(value) else math.inf


def mean(problem: Problem, make: Callable[[nn.Module], torch.optim.Optimizer]) -> float:
    """Over seeds."""
    return sum(train(problem, make, seed) for seed in SEEDS) / len(SEEDS)


FREE = {"kl_clip": None}
TIKHONOV = {"damping": 1e-3}
METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "EKFAC": nng.optim.EKFAC,
    "EKFAC, lr 0.01": lambda m: nng.optim.EKFAC(m, lr=0.01, **FREE),
    "EKFAC, lr 0.1": lambda m: nng.optim.EKFAC(m, lr=0.1, **FREE),
    "EKFAC, lr 0.1, kl_clip": lambda m: nng.optim.EKFAC(m, lr=0.1, kl_clip=1e-3),
    "EKFAC, Tikhonov": lambda m: nng.optim.EKFAC(m, lr=0.01, **FREE, **TIKHONOV),
    "EKFAC, Tikhonov, lr 0.1": lambda m: nng.optim.EKFAC(m, lr=0.1, **FREE, **TIKHONOV),
    "EKFAC, Tikhonov, lr 0.1, kl_clip": lambda m: nng.optim.EKFAC(m, lr=0.1, kl_clip=1e-3, **TIKHONOV),
    "KFAC": nng.optim.KFAC,
    "KFAC, balanced": lambda m: nng.optim.KFAC(m, damping=nng.FactoredTikhonov(1e-2)),
    "Adam": lambda m: torch.optim.Adam(m.parameters()),
}


def main(out: Path, most: int) -> None:
    """All methods on the first ``most`` examples of every problem."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", nng.optim.SkippedStepWarning)
    table = {}
    for name, problem in problems().items():
        problem = replace(problem, data=tuple(part[:most] for part in problem.data))
        sgd = lambda lr: lambda model: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        best = min(RATES, key=lambda lr: train(problem, sgd(lr), SEEDS[0]))
        table[name] = {method: mean(problem, make) for method, make in METHODS.items()} | {
            "SGD": mean(problem, sgd(best)),
            "SGD lr": float(f"{best:.2g}"),
        }
        print(f"{name:20s}", {k: float(f"{v:.3g}") for k, v in table[name].items()}, flush=True)
    path = out / "data" / "defaults.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1).replace("Infinity", "null"))  # diverged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="where data/defaults.json goes")
    parser.add_argument("--quick", action="store_true", help="200 examples")
    options = parser.parse_args()
    main(options.out, 200 if options.quick else 10**9)
