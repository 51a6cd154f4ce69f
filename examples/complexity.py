"""The complexity of the trajectory and the measures that compete with it, against the generalisation gap.

    python examples/complexity.py [--data FOLDER] [--seeds 3] [--quick]

500 MNIST digits, passes of batches of 50 (learning rate 0.05, momentum 0.9) until the training loss is 0.01, three
sweeps: the width of one hidden layer; label noise at width 256; the channels of a chain of three strided convolutions
and a linear layer. The gap is test loss less training loss, test labels as noisy as those of training. Beside ``C / n``
on 50 training images: norms of the parameters and of their distance from the start, their number, spectral complexity
over the margin (Bartlett et al. 2017), path norm (Neyshabur et al. 2015), unit capacity (Neyshabur et al. 2018: two
layers alone), Fisher-Rao norm (Liang et al. 2019). Nets have no biases, which two of these know nothing of.

Protocol: Baratin et al. 2021, figure 6 (there VGG-19 on CIFAR-10 for the channels).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, Data, band, batches, corrupt, figure
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread
from papers_nets import images
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom import analysis

PAGE = "papers.md"
MEASURES = {
    "gap": "generalisation gap",
    "complexity": "C / n",
    "norm": "norm of w",
    "distance": "distance from the start",
    "parameters": "number of parameters",
    "spectral": "spectral / margin",
    "path": "path norm / margin",
    "unit": "unit capacity / margin",
    "fisher_rao": "Fisher-Rao norm",
}
SWEEPS: dict[str, list[Any]] = {
    "hidden width": [8, 16, 32, 64, 128, 256, 512],
    "label noise": [0.0, 0.1, 0.2, 0.3, 0.5],
    "channels": [2, 4, 8, 16, 32],
}


def perceptron(shape: tuple[int, int, int], width: int) -> nn.Sequential:
    """One hidden layer."""
    first = nn.Linear(shape[0] * shape[1] * shape[2], width, bias=False)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(width, 10, bias=False))


def chain(shape: tuple[int, int, int], channels: int) -> nn.Sequential:
    """Three convolutions of stride 2, of ``channels``, twice and four times as many, and a linear layer."""
    layers: list[nn.Module] = []
    inputs, sides = shape[0], list(shape[1:])
    for j in range(3):
        layers += [nn.Conv2d(inputs, channels << j, 3, 2, 1, bias=False), nn.ReLU()]
        inputs, sides = channels << j, [(side + 1) // 2 for side in sides]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * sides[0] * sides[1], 10, bias=False))
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


def measured(model: nn.Module, start: nn.Module, loader: list[Any]) -> dict[str, float | None]:
    """The measures of the net at the end."""
    margin = {"quantile": 0.1}
    spectral = analysis.spectral_margin(model, loader, start, **margin)
    two = sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model) == 2
    end, begin = nng.PVector.from_model(model), nng.PVector.from_model(start)
    return {
        "norm": float(end.norm()),
        "distance": float((end - begin).norm()),
        "parameters": float(end.flat().numel()),
        "spectral": float(spectral.value),
        "path": float(analysis.path_norm(model, loader) / spectral.margin),
        "unit": float(analysis.unit_capacity(model, loader, start, **margin).value) if two else None,
        "fisher_rao": float(analysis.fisher_rao_norm(model, loader)),
    }


def run(data: Data, sweep: str, value: Any, seed: int, most: int) -> dict[str, Any]:
    """Train to a loss of 0.01, or for ``most`` epochs, and measure."""
    noise = value if sweep == "label noise" else 0.0
    order, y = torch.Generator().manual_seed(seed), corrupt(data.y, noise, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    width = value if sweep == "hidden width" else 256
    model = chain(data.shape, value) if sweep == "channels" else perceptron(data.shape, width)
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    measure = analysis.ComplexityMeasure(model, [(data.x[:50], y[:50])], every=5)
    for _ in range(most):
        for bx, by in batches(data.x, y, 50, order):
            optimizer.zero_grad()
            F.cross_entropy(model(bx), by).backward()
            optimizer.step()
            measure.update()
        with torch.no_grad():
            loss = float(F.cross_entropy(model(data.x), y))
        if loss < 0.01:
            break
    noisy = corrupt(data.y_test, noise, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        gap = float(F.cross_entropy(model(data.x_test), noisy)) - loss
    found = measured(model, start, [(data.x, y)]) if loss < 0.5 else {}  # the margin is not positive before
    return {"gap": gap, "complexity": measure.normalized, "loss": loss, "steps": measure.steps, **found}


def correlation(cells: dict[str, Any], sweep: str, key: str) -> float:
    """The rank correlation of a measure with the gap over the values of a sweep, means over seeds; NaN if constant."""
    runs = [seeds_of(cells, f"{sweep}/{value}") for value in SWEEPS[sweep]]
    if any(r.get(key) is None for line in runs for r in line) or not all(runs):
        return float("nan")
    gaps, found = ([np.mean([r[name] for r in line]) for line in runs] for name in ("gap", key))
    return float(spearmanr(found, gaps).statistic) if np.ptp(found) else float("nan")


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Rank correlations, and the gap and complexity at both ends of a sweep."""
    rows = []
    for key, name in MEASURES.items():
        row = [name]
        for sweep, values in SWEEPS.items():
            ends = [seeds_of(cells, f"{sweep}/{value}") for value in (values[0], values[-1])]
            shown = [spread([r.get(key) for r in line], ".2g") for line in ends]
            found = correlation(cells, sweep, key)
            row += [" to ".join(shown), "-" if np.isnan(found) or key == "gap" else f"{found:+.2f}"]
        rows.append(row)
    ends = [(f"{sweep}, {values[0]:g} to {values[-1]:g}", "rank correlation") for sweep, values in SWEEPS.items()]
    return {"complexity": table(["", *(head for pair in ends for head in pair)], rows)}


def draw(cells: dict[str, Any], path: Any) -> None:
    """A panel a sweep: the gap and the measures of the trained net, divided by what they are at the first value."""
    fig, axes = figure(1, len(SWEEPS), 11, 4.4)
    colours = dict(zip(MEASURES, [COLOURS[-1], *COLOURS[:-1], "#999999", "#8B4513"]))
    for ax, (sweep, values) in zip(axes[0], SWEEPS.items()):
        runs = [seeds_of(cells, f"{sweep}/{value}") for value in values]
        for key, title in MEASURES.items():
            if key == "parameters" or any(r.get(key) is None for line in runs for r in line):
                continue
            first = mean([r[key] for r in runs[0]])
            relative = [[r[key] / first for r in line] for line in runs]
            style = {"ls": "--", "zorder": 3} if key == "gap" else {}
            band(ax, values, list(zip(*relative)), title, colours[key], marker="o", ms=3, **style)
        ax.set(xlabel=sweep, yscale="log")
        ax.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8"], minor=False)
        ax.minorticks_off()
        if sweep != "label noise":
            ax.set_xscale("log", base=2)
    axes[0, 0].set(ylabel="divided by that at the first value")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8.5)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All sweeps, one table, one figure."""
    args = options(__doc__, argv, epochs=300, examples=500)
    if args.quick:
        args.epochs, args.examples = 1, 50
    data = images(args.data, args.examples, 20 if args.quick else 1000)
    cells = Cells(args, "complexity", epochs=args.epochs, examples=args.examples)
    for seed in range(args.seeds):
        for sweep, values in SWEEPS.items():
            for value in values:
                one = lambda w=sweep, v=value, s=seed: run(data, w, v, s, args.epochs)
                cells.add(f"{sweep}/{value}/{seed}", one)
    draw(cells.cells, args.out / "images" / "complexity.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
