"""Model Gradient Similarity: the bench of regularisers over training sizes and label noise, on MNIST.

    python examples/mgs_bench.py [--data FOLDER] [--seeds 3] [--model FCN LeNet] [--quick]

Motion-blurred training images, clean test images; 143 settings, of 250 to 3000 images with 0 to 100 % of the labels
flipped; a fully connected net on 28 x 28 and a LeNet-like one on 14 x 14; eight methods, each tuned once (600 images,
50 % noise, a validation split of 600) and then kept. 30 epochs of batches of 32, SGD 0.05 with momentum 0.9. Final:
mean of the last three evaluations. At the end of each run the metrics of the kernel on 32 training images; along the
runs with 1000 images and 60 % noise too. The settings with 1000 images and 30 or 60 % noise are run with all seeds, the
others with ``--others`` (1) of them.

Protocol: Szolnoky et al. 2022, sections 6.1 and D.1 (there 143 settings of 250 to 9000 images, 10 seeds, 400 epochs).
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_common import Data, accuracy, band, corrupt, figure, motion_blur
from lazy_common import save
from mgs_common import (
    COLOUR,
    GRIDS,
    Recipe,
    build,
    chosen,
    measured,
    rank_correlation,
    strength_of,
    train,
    tune,
)
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread
from papers_nets import images
from torch.nn import functional as F

PAGE = "mgs.md"
NETS = ("FCN", "LeNet")
SIZES = (250, 300, 400, 500, 600, 700, 800, 1000, 1200, 1500, 2000, 2500, 3000)
NOISES = tuple(i / 10 for i in range(11))
SHOWN = (1000, (0.0, 0.3, 0.6, 0.8))  # of the table a method
SEVERAL = {(net, 1000, noise) for net in NETS for noise in (0.3, 0.6)}
SEEN = ("FCN", 1000, 0.6)  # whose metrics are taken along training
TUNING = 600


def data_of(folder: Path | None, net: str, size: int, seed: int, *, validation: bool = False) -> Data:
    """Blurred training images and clean ones to judge by: of the test, or for tuning others of the training part."""
    found = images(folder, size + (TUNING if validation else 0), 600, seed)
    x, y = found.x[size:] if validation else found.x_test, found.y[size:] if validation else found.y_test
    blurred = motion_blur(found.x[:size], 7 if found.shape[1] > 20 else 3)
    if net == "LeNet" and found.shape[1] > 20:
        blurred, x = F.avg_pool2d(blurred, 2), F.avg_pool2d(x, 2)
    return Data(blurred, found.y[:size], x, y)


def run(net: str, data: Data, noise: float, recipe: Recipe, seed: int, *, seen: bool = False) -> dict[str, Any]:
    """Accuracy along one training and the metrics at its end; with ``seen`` along it."""
    torch.manual_seed(seed)
    model, y = build(net, data.shape, recipe.dropout), corrupt(data.y, noise, torch.Generator().manual_seed(seed))
    found: dict[str, Any] = {"accuracy": [], "metrics": []} | ({"epoch": []} if seen else {})

    def visit(epoch: int) -> None:
        if seen:
            found["epoch"].append(epoch)
        found["accuracy"].append(accuracy(model, data.x_test, data.y_test))
        if seen or epoch == recipe.epochs:
            found["metrics"].append(measured(model, data.x[:32]))

    train(model, data.x, y, recipe, visit, seed=seed)
    return found


def final(found: dict[str, Any]) -> float:
    """Mean of the last three evaluations."""
    return mean(found["accuracy"][-3:])


def fill(args: argparse.Namespace, cells: Cells) -> None:
    """Tuning and bench of all nets, a seed after the other."""
    sizes, noises = ((60,), (0.6,)) if args.quick else (SIZES, NOISES)
    for net in args.model:
        apart = data_of(args.data, net, sizes[0] if args.quick else TUNING, 99, validation=True)
        score = lambda method, strength, net=net, data=apart: final(
            run(net, data, 0.5, Recipe(method, strength, epochs=args.epochs), 99)
        )
        tune(cells, net, GRIDS, score, quick=args.quick)
    for seed, net, size, noise in product(range(args.seeds), args.model, sizes, noises):
        if seed >= args.others and (net, size, noise) not in SEVERAL:
            continue
        data, strengths = data_of(args.data, net, size, seed), chosen(cells.cells, net)
        for method, strength in strengths.items():
            recipe, seen = Recipe(method, strength, epochs=args.epochs), (net, size, noise) == SEEN
            compute = lambda r=recipe, s=seen: run(net, data, noise, r, seed, seen=s)  # noqa: B023 (called at once)
            cells.add(f"{net}/{size}/{noise}/{method}/{seed}", compute)


def settings(cells: dict[str, Any], net: str) -> list[tuple[int, float]]:
    """Sizes and noises that were run."""
    names = [name.split("/") for name in cells if name.startswith(f"{net}/") and "/tuning/" not in name]
    return sorted({(int(size), float(noise)) for _, size, noise, *_ in names})


def shown_of(cells: dict[str, Any], net: str) -> tuple[int, list[float]]:
    """The size and the noises of :func:`cell_rows`: of what was run."""
    found = settings(cells, net)
    size = SHOWN[0] if any(size == SHOWN[0] for size, _ in found) else max(found)[0]
    noises = [noise for s, noise in found if s == size]
    return size, [noise for noise in noises if noise in SHOWN[1]] or noises


def cell_rows(cells: dict[str, Any], net: str) -> list[list[str]]:
    """A method a row, a noise a column, at one size; in percent."""
    (size, noises), rows = shown_of(cells, net), []
    for method, strength in chosen(cells, net).items():
        row = [net, strength_of(method, strength, GRIDS[method])]
        for noise in noises:
            runs = seeds_of(cells, f"{net}/{size}/{noise}/{method}")
            highest = np.mean([r["accuracy"] for r in runs], 0).max()
            row.append(f"{spread([100 * final(r) for r in runs])} ({100 * highest:.1f})")
        rows.append(row)
    return rows


def finals_of(cells: dict[str, Any], net: str) -> dict[str, np.ndarray]:
    """Of every method its final accuracy in all :func:`settings`, in percent."""
    grid = settings(cells, net)
    return {
        m: np.array([mean([100 * final(r) for r in seeds_of(cells, f"{net}/{s}/{noise}/{m}")]) for s, noise in grid])
        for m in GRIDS
    }


def whole_rows(cells: dict[str, Any], net: str) -> list[list[str]]:
    """A method a row, over all settings: accuracy, what is lost since the best, where it is first, metrics at the
    end.
    """
    grid, finals = settings(cells, net), finals_of(cells, net)
    best, rows = np.max(list(finals.values()), 0), []
    for method in GRIDS:
        runs = [seeds_of(cells, f"{net}/{s}/{noise}/{method}") for s, noise in grid]
        lost = [100 * np.mean([r["accuracy"] for r in found], 0).max() for found in runs] - finals[method]
        ends = [r["metrics"][-1] for found in runs for r in found]
        row = [net, method, f"{finals[method].mean():.1f}", f"{lost.mean():.1f}"]
        row += [f"{(finals[method] - finals['none']).min():+.1f}", str((finals[method] == best).sum())]
        row += [str((finals[method] >= best - 2).sum())]
        rows.append([*row, *(f"{mean([e[key] for e in ends]):.3g}" for key in ("trace", "log", "rank", "cosine"))])
    return rows


def correlation_rows(cells: dict[str, Any], net: str) -> list[list[str]]:
    """A noise a row: over methods, how the final metrics go with the final accuracy, means over sizes."""
    grid, finals, rows = settings(cells, net), finals_of(cells, net), []
    for noise in sorted({noise for _, noise in grid}):
        row = [net, f"{100 * noise:g} %"]
        for key in ("trace", "log", "rank", "cosine"):
            values = []
            for j, (size, _) in [(j, setting) for j, setting in enumerate(grid) if setting[1] == noise]:
                runs = [seeds_of(cells, f"{net}/{size}/{noise}/{m}") for m in GRIDS]
                ends = [mean([r["metrics"][-1][key] for r in found]) for found in runs]
                values.append(rank_correlation(ends, [finals[m][j] for m in GRIDS]))
            row.append(f"{mean(values):+.2f}")
        rows.append(row)
    return rows


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """One size; all settings; metrics against accuracy."""
    nets = [net for net in NETS if settings(cells, net)]
    noises = shown_of(cells, nets[0])[1]
    shown = [row for net in nets for row in cell_rows(cells, net)]
    whole = [row for net in nets for row in whole_rows(cells, net)]
    head = ["net", "method", "mean final accuracy", "lost since the best", "worst against plain", "first", "within 2"]
    metrics = ["mean eigenvalue", "mean log eigenvalue", "effective rank", "cosine"]
    related = [row for net in nets for row in correlation_rows(cells, net)]
    return {
        "mgs_bench": table(["net", "method, strength", *(f"{100 * noise:g} %" for noise in noises)], shown),
        "mgs_bench_all": table([*head, *metrics], whole),
        "mgs_bench_metrics": table(["net", "noise", *metrics], related),
    }


def draw_bench(cells: dict[str, Any], path: Path) -> None:
    """Final accuracy of the plain net over sizes and noises, and what every method adds."""
    nets = [net for net in NETS if settings(cells, net)]
    fig, axes = figure(len(nets), len(GRIDS), 11.5, 2.2 * len(nets) + 0.4)
    for row, net in zip(axes, nets):
        grid, finals = settings(cells, net), finals_of(cells, net)
        sizes, noises = sorted({s for s, _ in grid}), sorted({noise for _, noise in grid})
        for ax, method in zip(row, GRIDS):
            plain = method == "none"
            values = (finals[method] if plain else finals[method] - finals["none"]).reshape(len(sizes), len(noises))
            scale = {"vmin": 0, "vmax": 100, "cmap": "viridis"} if plain else {"vmin": -20, "vmax": 20, "cmap": "RdBu"}
            shown = ax.imshow(values, aspect="auto", origin="lower", **scale)
            some, few = range(0, len(noises), 5), range(0, len(sizes), 3)
            ax.set_xticks(some, [f"{100 * noises[i]:g}" for i in some])
            ax.set_yticks(few, [sizes[i] if ax is row[0] else "" for i in few])
            ax.set_title("plain: accuracy" if plain else method.replace(", ", ",\n"), fontsize=8.5)
            if plain:
                fig.colorbar(shown, ax=ax, location="left", label=f"{net}, %", shrink=0.8)
        row[0].set(ylabel="images")
        fig.colorbar(shown, ax=row[-1], label="points above plain", shrink=0.8)
    for ax in axes[-1]:
        ax.set(xlabel="flipped, %")
    save(fig, path)


def draw_curves(cells: dict[str, Any], path: Path) -> None:
    """Accuracy and metrics along the runs that were looked at."""
    fig, axes = figure(2, 2, 8.5, 6.4)
    axes = axes.reshape(1, 4)
    titles = {"trace": "mean eigenvalue", "log": "mean log eigenvalue", "rank": "effective rank"}
    net, size, noise = SEEN
    for method, colour in COLOUR.items():
        runs = seeds_of(cells, f"{net}/{size}/{noise}/{method}")
        if not runs:
            continue
        band(axes[0, 0], runs[0]["epoch"], [r["accuracy"] for r in runs], method, colour)
        for ax, key in zip(axes[0, 1:], titles):
            band(ax, runs[0]["epoch"], [[m[key] for m in r["metrics"]] for r in runs], "", colour)
    axes[0, 0].set(title="test accuracy", xlabel="epoch")
    for ax, (key, title) in zip(axes[0, 1:], titles.items()):
        ax.set(title=title, xlabel="epoch", yscale="log" if key == "trace" else "linear")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """Everything, three tables, two figures."""
    args = options(__doc__, argv, NETS, seeds=3, others=1, epochs=30)
    if args.quick:
        args.epochs = 2
    cells = Cells(args, "mgs_bench", epochs=args.epochs)
    fill(args, cells)
    draw_bench(cells.cells, args.out / "images" / "mgs_bench.png")
    draw_curves(cells.cells, args.out / "images" / "mgs_curves.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
