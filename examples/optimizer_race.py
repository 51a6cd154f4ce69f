"""Optimizers against each other on one task: the same number of settings each, the best of them on several seeds,
curves and plot.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import nngeom as nng

DOCS = Path(__file__).parent.parent / "docs"
SEEDS = (0, 1, 2)


class Setting(NamedTuple):
    """One point of a grid."""

    lr: float
    damping: float | None = None
    momentum: float = 0.9


Grid = list[Setting]


@dataclass(frozen=True)
class Training:
    """A task: the model by (seed, whether it has batch normalisation), the loss of outputs and targets, the data."""

    model: Callable[[int, bool], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    batch: int


def grid(rates: Iterable[float], dampings: Iterable[float | None] = (None,), momenta: Iterable[float] = (0.9,)) -> Grid:
    """All combinations."""
    return [Setting(*point) for point in itertools.product(rates, dampings, momenta)]


def optimizer(method: str, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    """A method at one setting of its grid; ``"KFAC, every 10"`` says after how many steps bases and inverses are
    computed anew, default 50.

    KFAC damps its factors as EKFAC does (``pi = 1``), ``"KFAC balanced"`` as Martens & Grosse 2015 do.
    """
    lr, damping, momentum = setting
    if method == "Adam":
        return torch.optim.Adam(model.parameters(), lr=lr, betas=(momentum, 0.999))
    if method.startswith("SGD"):
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    name, _, period = method.partition(", every ")
    damped, every = nng.FactoredTikhonov(damping, balanced=name.endswith("balanced")), int(period or 50)
    if name.startswith("KFAC"):
        return nng.optim.KFAC(model, lr, momentum, damped, inverse_every=every)
    return nng.optim.EKFAC(
        model, lr, momentum, damped, basis_every=every, scalings="running" if name == "EKFAC-ra" else "batch"
    )


def train(task: Training, method: str, setting: Setting, seed: int, epochs: int) -> dict:
    """The loss of the training set after each epoch, and the processor time of the training steps alone."""
    model = task.model(seed, method.endswith("batch norm"))
    opt = optimizer(method, model, setting)
    order = torch.Generator().manual_seed(1000 + seed)
    losses, seconds, spent = [], [], 0.0
    for _ in range(epochs):
        model.train()
        start = time.process_time()
        for index in torch.randperm(len(task.x), generator=order).split(task.batch)[: len(task.x) // task.batch]:
            x, y = task.x[index], task.y[index]
            opt.zero_grad()
            if isinstance(opt, nng.optim.NaturalGradient):
                with opt.observe():
                    task.loss(model(x), y).backward()
            else:
                task.loss(model(x), y).backward()
            opt.step()
        spent += time.process_time() - start
        model.eval()
        with torch.no_grad():
            value = float(task.loss(model(task.x), task.y))
        losses.append(value if math.isfinite(value) else None)
        seconds.append(round(spent, 4))
        if losses[-1] is None or value > 100:
            break
    return {
        "method": method,
        **setting._asdict(),
        "seed": seed,
        "loss": [v and float(f"{v:.5g}") for v in losses],
        "seconds": seconds,
    }


def final(run: dict, epochs: int) -> float:
    """The last loss; infinite where the run diverged."""
    return run["loss"][-1] if len(run["loss"]) == epochs and run["loss"][-1] is not None else math.inf


def experiment(task: Training, grids: dict[str, Grid], epochs: int, path: Path) -> None:
    """Grid on the first seed, the best setting on all; methods that ``path`` holds already are kept."""
    results: dict = {"epochs": epochs, "grid": {}, "best": {}}
    if path.exists() and json.loads(path.read_text())["epochs"] == epochs:
        results = json.loads(path.read_text())
    for method, grid in grids.items():
        if method in results["best"]:
            continue
        runs = [train(task, method, setting, SEEDS[0], epochs) for setting in grid]
        best = min(runs, key=lambda r: final(r, epochs))
        chosen = grid[runs.index(best)]
        results["grid"][method] = [
            {**setting._asdict(), "final": r["loss"][-1] if len(r["loss"]) == epochs else None}
            for setting, r in zip(grid, runs)
        ]
        results["best"][method] = [best] + [train(task, method, chosen, seed, epochs) for seed in SEEDS[1:]]
        print(
            f"{method:18s} {tuple(chosen)}: {[float(f'{final(r, epochs):.3g}') for r in results['best'][method]]}",
            flush=True,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results))


def plot(path: Path, image: Path) -> None:
    """Loss per epoch and per second of processor time, mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(path.read_text())
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
    for method, runs in results["best"].items():
        kept = [r for r in runs if math.isfinite(final(r, results["epochs"]))]
        if not kept:
            continue
        losses, seconds = torch.tensor([r["loss"] for r in kept]), torch.tensor([r["seconds"] for r in kept]).mean(0)
        for axis, at in zip(axes, (torch.arange(1, results["epochs"] + 1), seconds)):
            (line,) = axis.plot(at, losses.mean(0), label=method)
            axis.fill_between(at, losses.amin(0), losses.amax(0), alpha=0.2, color=line.get_color())
    axes[0].set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes[1].set(xlabel="seconds of processor time")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncol=4, fontsize=7)
    figure.tight_layout(rect=(0, 0, 1, 0.88))
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=80)
