"""The tangent kernel of convolutional nets along training: spectrum, effective rank, alignment by layer, label noise.

    python examples/alignment_of_images.py [--data FOLDER] [--model vgg resnet] [--seeds 3] [--quick]

A VGG-like and a residual net (109 594 and 174 778 parameters, batch normalisation in evaluation mode where measured) on
MNIST, SGD with momentum 0.9, batches of 100; with true labels, with half of them flipped, and then at a third of the
learning rate. Kernels of 100 training and of 100 test images (1000 x 1000), whole and layer by layer.

Protocol: Baratin et al. 2021, figures 2, 3, 11, 12, 14 (there VGG-19 and ResNet-18 on CIFAR-10).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, Data, accuracy, band, corrupt, figure
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from papers_nets import descend, images, network, settle
from torch import Tensor, nn

import nngeom as nng
from nngeom import analysis

PAGE = "papers.md"
TOP = (40, 80, 160)
SETTINGS = {"clean": (0.0, 0.01), "noise": (0.5, 0.01), "slow": (0.5, 0.003)}  # share of flipped labels, learning rate


def look(model: nn.Module, x: Tensor, y: Tensor, layers: bool) -> dict[str, Any]:
    """The spectrum of the centred kernel and its alignment with the labels, whole, uncentred and by layer."""
    kernels = nng.GramMatrices(model, [x], check=False)
    whole = torch.stack([k.tensor.double() for k in kernels.values()]).sum(0)
    values = analysis.spectrum(analysis.center(whole))
    found = {
        "max": float(values[0]),
        "mean": float(values.mean()),
        "median": float(values.median()),
        "rank": float(analysis.effective_rank(values)),
        "trace ratios": analysis.trace_ratios(values, TOP),
        "cka": float(analysis.kernel_label_alignment(whole, y)),
        "uncentred": float(analysis.kernel_label_alignment(whole, y, centered=False)),
    }
    if layers:
        wide = {name: k for name, k in kernels.items() if isinstance(model.get_submodule(name), (nn.Conv2d, nn.Linear))}
        found["layers"] = [float(analysis.kernel_label_alignment(k.tensor.double(), y)) for k in wide.values()]
    return found


def trained(
    net: tuple[str, int], data: Data, setting: str, points: tuple[int, ...], probe: int, seed: int
) -> dict[str, Any]:
    """One training of a net by name and width, measured at ``points`` on training and on test images."""
    noise, lr = SETTINGS[setting]
    y = corrupt(data.y, noise, torch.Generator().manual_seed(seed))
    model = network(net[0], data.shape, seed, net[1])
    settle(model, data.x[:500])
    seen: dict[str, list[Any]] = {"step": [], "train": [], "test": [], "train accuracy": [], "test accuracy": []}

    def visit(step: int) -> None:
        if step in points:
            seen["step"].append(step)
            seen["train"].append(look(model, data.x[:probe], y[:probe], layers=setting != "slow"))
            seen["test"].append(look(model, data.x_test[:probe], data.y_test[:probe], layers=setting != "slow"))
            seen["train accuracy"].append(accuracy(model, data.x, y))
            seen["test accuracy"].append(accuracy(model, data.x_test, data.y_test))

    descend(model, data.x, y, visit, steps=max(points), lr=lr, seed=seed)
    return seen


def runs_of(cells: dict[str, Any], model: str, setting: str) -> list[dict[str, Any]]:
    return seeds_of(cells, f"{model}/{setting}")


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Start, lowest effective rank, best test accuracy, end."""
    rows = []
    for prefix in dict.fromkeys(name.rpartition("/")[0] for name in cells):
        runs = seeds_of(cells, prefix)
        curve = lambda part, key, runs=runs: np.array([[r[key] for r in run[part]] for run in runs])
        rank, cka, uncentred = (curve("train", key) for key in ("rank", "cka", "uncentred"))
        top = curve("train", "max")
        low = int(rank.mean(0).argmin())
        row = [prefix.replace("/", ", "), *(spread(rank[:, at]) for at in (0, low, -1)), str(runs[0]["step"][low])]
        row += [spread(top.max(1) / top[:, 0]), *(spread(cka[:, at], ".2g") for at in (0, -1))]
        row += [spread(curve("test", "cka")[:, -1], ".2g"), spread(uncentred[:, -1], ".2g")]
        row += [spread([max(run["test accuracy"]) for run in runs]), spread([run["test accuracy"][-1] for run in runs])]
        rows.append(row)
    head = ["net, labels", "rank at start", "lowest", "at the end", "step of the lowest", "largest eigenvalue, times"]
    head += ["CKA at start", "at the end", "on test points", "uncentred, end", "best test accuracy", "last"]
    return {"alignment_of_images": table(head, rows)}


def curve(ax: Any, runs: list[Any], part: str, value: Any, *, label: str, colour: str, style: str = "-") -> None:
    """The band of one number along training."""
    points = [[value(record) for record in run[part]] for run in runs]
    band(ax, [max(step, 0.7) for step in runs[0]["step"]], points, label, colour, ls=style)


def draw(cells: dict[str, Any], model: str, path: Any) -> None:
    """A column a setting: accuracy, eigenvalues, effective rank, trace ratios, alignment, alignment by layer."""
    import matplotlib

    there = [name for name in SETTINGS if runs_of(cells, model, name)]
    fig, axes = figure(6, len(there), 3.1 * len(there), 12.5, sharex=True)
    for column, name in zip(axes.T, there):
        runs, (noise, lr) = runs_of(cells, model, name), SETTINGS[name]
        steps = [max(step, 0.7) for step in runs[0]["step"]]
        for colour, part in zip(COLOURS, ("train", "test")):
            band(column[0], steps, [run[f"{part} accuracy"] for run in runs], part, colour)
            curve(column[2], runs, part, lambda r: r["rank"], label=part, colour=colour)
            curve(column[4], runs, part, lambda r: r["cka"], label=f"{part}, centred", colour=colour)
            curve(column[4], runs, part, lambda r: r["uncentred"], label=f"{part}, uncentred", colour=colour, style=":")
        for colour, key in zip(COLOURS, ("max", "mean", "median")):
            curve(column[1], runs, "train", lambda r, key=key: r[key], label=key, colour=colour)
            curve(column[1], runs, "test", lambda r, key=key: r[key], label="", colour=colour, style="--")
        for j, (colour, k) in enumerate(zip(COLOURS, TOP)):
            curve(column[3], runs, "train", lambda r, j=j: r["trace ratios"][j], label=f"top {k}", colour=colour)
            curve(column[3], runs, "test", lambda r, j=j: r["trace ratios"][j], label="", colour=colour, style="--")
        layers = len(runs[0]["test"][0].get("layers", ()))
        for j, colour in enumerate(matplotlib.colormaps["viridis"](np.linspace(0, 0.95, layers))):
            points = np.mean([[r["layers"][j] for r in run["test"]] for run in runs], 0)
            column[5].plot(steps, points, color=colour, lw=1.2, label={0: "first", layers - 1: "last"}.get(j))
        for ax in column:
            ax.set(xscale="log", xlim=(0.65, None))
        column[1].set(yscale="log")
        column[0].set(title=f"{100 * noise:.0f} % flipped, rate {lr:g}", ylim=(0, 1.02))
        column[5 if layers else 4].set(xlabel="step (the first: before training)")
        column[4].tick_params(labelbottom=not layers)
        if not layers:
            column[5].remove()
    titles = ("accuracy", "eigenvalues", "effective rank", "trace ratio", "alignment", "CKA by layer, test")
    for ax, title in zip(axes[:, 0], titles):
        ax.set(ylabel=title)
        ax.legend(fontsize=7.5)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All runs, one table, a figure a net."""
    args = options(__doc__, argv, models=("vgg", "resnet", "resnet-gn"), steps=220, probe=100, width=16)
    if args.quick:
        args.steps, args.probe, args.width, args.model = 2, 10, 4, args.model[:1]
    points = tuple(p for p in (0, 5, 20, 60, 120, 220, 400, 800) if p <= args.steps)
    data = images(args.data, 200 if args.quick else 1000, 40 if args.quick else 1000)
    cells = Cells(args, "alignment_of_images", points=points, probe=args.probe, width=args.width)
    for model in args.model:
        for setting in SETTINGS:
            for seed in range(args.seeds):
                run = lambda m=model, n=setting, s=seed: trained((m, args.width), data, n, points, args.probe, s)
                cells.add(f"{model}/{setting}/{seed}", run)
        draw(cells.cells, model, args.out / "images" / f"alignment_{model}.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
