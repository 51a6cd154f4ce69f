"""The tangent kernel along training on digits: spectrum, effective rank, alignment; label noise, easy and hard, depth.

    python examples/ntk_of_digits.py [--data FOLDER] [--seeds 5] [--quick]

(a) 1000 8 x 8 digits, 0 or 50 % flipped labels, 5 hidden layers of 80, SGD 0.02 with momentum 0.9, batches of 100:
kernels of 50 training and 50 test images; the dashboard of one run. (b) 1400 digits of which 140 carry random labels:
alignment of the kernel restricted to easy and to difficult ones, for depth 2, 4 and 6.

Protocol: Baratin et al. 2021, figs 2-4.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, Data, accuracy, band, batches, corrupt, figure, load, mlp
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.analysis import group_alignment
from nngeom.track import Tracker, geometric

PAGE = "analysis.md"
NOISES, DEPTHS = (0.0, 0.5), (2, 4, 6)
PROBE = ("effective_rank", "trace_ratios", "alignment")
ALL = (*PROBE, "loss", "accuracy", "spectrum", "alignment_by_layer", "mgs", "coherence")
KEPT = ("step", "effective_rank", "trace_ratio_40", "alignment")
TITLES = ("effective rank", "trace in the top 40 of 500", "CKA with the labels")


def noisy_run(data: Data, noise: float, steps: int, seed: int, dashboard: Path | None = None) -> dict[str, Any]:
    """One run with kernels of training and test points."""
    torch.manual_seed(seed)
    order, y = torch.Generator().manual_seed(seed), corrupt(data.y, noise, torch.Generator().manual_seed(seed))
    model = mlp(data.x[0].numel(), 80, 5)
    train = Tracker(model, [(data.x[:50], y[:50])], PROBE, geometric(1.35))
    test = Tracker(model, [(data.x_test[:50], data.y_test[:50])], ALL if dashboard else PROBE, geometric(1.35))

    def look(step: int, loss: Tensor) -> None:
        if train.step(step, train_loss=float(loss.detach())) is not None:
            scores = {
                "train_accuracy": accuracy(model, data.x, y),
                "test_accuracy": accuracy(model, data.x_test, data.y_test),
            }
            test.step(step, train_loss=float(loss.detach()), **scores)

    descend(model, data.x, y, look, order, steps)
    if dashboard:
        dashboard.parent.mkdir(parents=True, exist_ok=True)
        test.plot(dashboard, title="A net of five hidden layers learns digits: probe of 50 test images")
        print(f"wrote {dashboard}; the full dashboard took {100 * test.overhead:.0f} % of the run")
    accuracies = {name: test.history[name] for name in ("train_accuracy", "test_accuracy")}
    found = {part: {name: t.history[name] for name in KEPT} for part, t in (("train", train), ("test", test))}
    return {**found, **accuracies}


def descend(model: nn.Module, x: Tensor, y: Tensor, look: Any, order: torch.Generator, steps: int) -> None:
    """SGD; ``look(step, loss)`` before every step, to the end of the epoch in which ``steps`` are done."""
    optimizer, step = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), 0
    while step <= steps:
        for bx, by in batches(x, y, 100, order):
            loss = F.cross_entropy(model(bx), by)
            look(step, loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def depth_run(data: Data, depth: int, steps: int, seed: int) -> dict[str, list[float]]:
    """Alignment of easy and difficult training points along training."""
    torch.manual_seed(seed)
    order, g = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    y = data.y.clone()
    y[:140] = torch.randint(0, 10, (140,), generator=g)
    groups = {"difficult": torch.arange(50), "easy": torch.arange(50, 100)}
    model = mlp(data.x[0].numel(), 60, depth)

    def hierarchy(model: nn.Module, batches: Any) -> dict[str, Tensor]:
        return group_alignment(nng.GramMatrix(model, batches, check=False), y[90:190], groups)

    tracker = Tracker(model, [(data.x[90:190], y[90:190])], [hierarchy], geometric(1.35))
    descend(model, data.x, y, lambda step, loss: tracker.step(step), order, steps)
    return {name: tracker.history[name] for name in ("step", "easy", "difficult")}


def columns(runs: list[Any], part: str, key: str) -> np.ndarray:
    """``(seeds, points)`` of the training or the test points."""
    return np.array([r[part][key] for r in runs])


def noise_rows(cells: dict[str, Any]) -> list[list[str]]:
    """Labels and points a row: the effective rank from its highest value before learning on, CKA, accuracy."""
    rows = []
    for noise in NOISES:
        runs = seeds_of(cells, f"noise {noise:g}")
        scores = np.array([r["test_accuracy"] for r in runs])
        for part in ("train", "test"):
            rank, cka = columns(runs, part, "effective_rank"), columns(runs, part, "alignment")
            low = int(rank.mean(0).argmin())
            row = [f"{100 * noise:g} %", "training" if part == "train" else part]
            row += [spread(v) for v in (rank[:, 0], rank[:, : low + 1].max(1), rank[:, low])]
            row += [str(runs[0][part]["step"][low]), spread(rank[:, -1])]
            row += [spread(v, ".2g") for v in (cka[:, 0], cka.max(1), cka[:, -1])]
            rows.append([*row, *(spread(v) for v in (scores.max(1), scores[:, -1]))])
    return rows


def depth_rows(cells: dict[str, Any]) -> list[list[str]]:
    """A depth a row, each number over seeds where each has its highest."""
    rows = []
    for depth in DEPTHS:
        runs = seeds_of(cells, f"depth {depth}")
        easy, hard = (np.array([r[key] for r in runs]) for key in ("easy", "difficult"))
        at = (easy / hard).argmax(1)
        steps = [float(runs[0]["step"][j]) for j in at]
        ratio = [float(e[j] / h[j]) for e, h, j in zip(easy, hard, at)]
        rows.append([str(depth), *(spread(v, ".2g") for v in (easy.max(1), hard.max(1), ratio)), spread(steps, ".0f")])
    return rows


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Without and with label noise; easy and difficult examples by depth."""
    ranks = ["effective rank at the start", "highest before the lowest", "lowest", "at step", "at the end"]
    head = ["flipped", "points", *ranks, "CKA at the start", "highest", "at the end"]
    depths = ["hidden layers", "highest CKA, easy", "highest CKA, random labels", "highest ratio", "at step"]
    return {
        "ntk_of_digits": table([*head, "best test accuracy", "last"], noise_rows(cells)),
        "ntk_of_digits_depth": table(depths, depth_rows(cells)),
    }


def draw_noise(cells: dict[str, Any], path: Path) -> None:
    """Accuracy and kernels along training, without noise to the left, with it to the right."""
    fig, axes = figure(4, 2, 8.5, 9.6)
    for row, noise in zip(axes.T, NOISES):
        runs = seeds_of(cells, f"noise {noise:g}")
        x = runs[0]["train"]["step"]
        band(row[0], x, [r["train_accuracy"] for r in runs], "training labels", COLOURS[0])
        band(row[0], x, [r["test_accuracy"] for r in runs], "test", COLOURS[1])
        for part, colour in (("train", COLOURS[0]), ("test", COLOURS[1])):
            for ax, key in zip(row[1:], KEPT[1:]):
                band(ax, x, columns(runs, part, key), f"{part} points", colour)
        for ax, title in zip(row, ("accuracy", *TITLES)):
            ax.set(title=f"{title}, {100 * noise:.0f} % noise", xlabel="step", xscale="symlog", xlim=(0, None))
            ax.legend(fontsize=7.5)
    save(fig, path)


def draw_depth(cells: dict[str, Any], path: Path) -> None:
    """Alignment with easy and difficult examples, and its ratio, by depth."""
    fig, axes = figure(2, 2, 8.5, 5.6)
    axes = axes.reshape(1, 4)
    for j, depth in enumerate(DEPTHS):
        runs = seeds_of(cells, f"depth {depth}")
        x, (easy, hard) = runs[0]["step"], (np.array([r[key] for r in runs]) for key in ("easy", "difficult"))
        band(axes[0, j], x, easy, "easy", COLOURS[2])
        band(axes[0, j], x, hard, "random labels", COLOURS[3])
        band(axes[0, 3], x, easy / hard, f"depth {depth}", COLOURS[j])
        axes[0, j].set(title=f"CKA with the labels, depth {depth}", ylim=(0, 0.16))
    axes[0, 3].set(title="easy / difficult")
    for ax in axes[0]:
        ax.set(xlabel="step", xscale="symlog", xlim=(0, None))
        ax.legend(fontsize=7.5)
    save(fig, path)


def fill(args: argparse.Namespace, cells: Cells) -> None:
    """All runs, a seed after the other."""
    data, more = load(args.data, 1000, 300), load(args.data, 1400, 300)
    for seed in range(args.seeds):
        for noise in NOISES:
            dashboard = args.out / "images" / "ntk_dashboard.png" if seed == noise == 0 else None
            compute = lambda n=noise, s=seed, d=dashboard: noisy_run(data, n, args.steps, s, d)
            cells.add(f"noise {noise:g}/{seed}", compute)
        for depth in DEPTHS:
            cells.add(f"depth {depth}/{seed}", lambda d=depth, s=seed: depth_run(more, d, args.steps // 2, s))


def main(argv: list[str] | None = None) -> None:
    """All runs, two tables, three figures."""
    args = options(__doc__, argv, seeds=5, steps=3000)
    args.steps = 60 if args.quick else args.steps
    cells = Cells(args, "ntk_of_digits", steps=args.steps)
    fill(args, cells)
    draw_noise(cells.cells, args.out / "images" / "ntk_of_digits.png")
    draw_depth(cells.cells, args.out / "images" / "ntk_depth.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
