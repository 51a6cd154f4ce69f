"""Where a network is ahead of its linearisation: yin-yang data, loss-difference maps at equal training loss.

    python examples/lazy_yin_yang.py [--seeds 100] [--workers 2]

For every seed: 100 points of the yin-yang data, a 4-layer ReLU network (2-60-60-60-1, PyTorch's initialisation),
full-batch gradient descent (learning rate 0.05, momentum 0.9, logistic loss, float64) with alpha = 1 and, from the same
start, with alpha = 100. Both runs are read where their training loss first reaches 0.6, 0.5, 0.4 and 0.3; the map shows
the loss of alpha = 1 minus that of alpha = 100 on a grid, averaged over the seeds. Finished seeds are kept in
out/lazy_yin_yang/.

Writes out/lazy_yin_yang.png. Protocol: George 2023, thesis, section 5.3.1 and fig. 5.1.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from lazy_common import COLOURS, descend, figure, save
from torch import nn
from torch.nn import functional as F

from nngeom.linearized import Grid, equal_progress, in_disks, linearity, yin_yang, yin_yang_label

LEVELS = [0.6, 0.5, 0.4, 0.3]
GRID = Grid(-1, 1, 40)


def logistic(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``(n,)`` losses of one logit each."""
    return F.binary_cross_entropy_with_logits(outputs[:, 0], y.double(), reduction="none")


def regions() -> dict[str, torch.Tensor]:
    """Grid points in the disks, and those farther than 0.5 from any point of the other class."""
    points = GRID.points.double()
    label = yin_yang_label(points)
    distance = torch.cdist(points, points)
    distance[label[:, None] == label[None]] = torch.inf
    return {"easy": distance.amin(1) > 0.5, "disks": in_disks(points)}


def one_seed(seed: int) -> dict[str, np.ndarray]:
    """Both regimes from one start."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    x, y = yin_yang(100, torch.Generator().manual_seed(seed))
    x, points = x.double(), GRID.points.double()
    target = yin_yang_label(points)
    layers = [nn.Linear(2, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 1)]
    model = nn.Sequential(*layers).double()

    def measure(scaled, each):
        now = linearity(scaled, None, [(x, y)])
        return {
            "grid": logistic(scaled(points), target),
            "signs": now.sign_similarity,
            "kernel": now.kernel_alignment,
            "representation": now.representation_alignment,
        }

    hasty, lazy = (
        descend(model, a, x, y, logistic, measure, lr=0.05, every=0.03, until=0.28, steps=12000) for a in (1.0, 100.0)
    )
    both = equal_progress(hasty, lazy, LEVELS)
    out = {
        "difference": both.difference("grid").numpy(),
        "reached": np.stack([both.a["step"].numpy(), both.b["step"].numpy()]),
    }
    for name in ("signs", "kernel", "representation"):
        out[name] = np.stack([both.a[name].numpy(), both.b[name].numpy()])
    steps = np.unique(np.geomspace(1, 12000, 80).astype(int))
    out["curves"] = np.stack([np.interp(steps, r["step"], r["loss"], right=np.nan) for r in (hasty, lazy)])
    return out


def saved_seed(seed: int) -> dict[str, np.ndarray]:
    """:func:`one_seed`, kept in a file."""
    path = Path("out/lazy_yin_yang") / f"{seed}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **one_seed(seed))
    return dict(np.load(path))


def draw(path: Path, runs: dict[str, np.ndarray]) -> None:
    """Data, curves, linearity, regions above; the four maps below."""
    fig, axes = figure(2, 4, 12, 6)
    seeds = len(runs["difference"])
    points, names = GRID.points, {1.0: "alpha = 1", 100.0: "alpha = 100"}
    x, y = yin_yang(100, torch.Generator().manual_seed(0))
    top = axes[0]
    box = [-1, 1, -1, 1]
    top[0].imshow(GRID.image(yin_yang_label(points)), extent=box, origin="lower", cmap="Greys", vmax=3)
    for c, marker, colour in ((0, "o", "#ffffff"), (1, "s", "#000000")):
        top[0].scatter(*x[y == c].T, s=12, marker=marker, c=colour, edgecolors="#000000", linewidths=0.6)
    top[0].set(title="(a) classes and one data set", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    steps = np.unique(np.geomspace(1, 12000, 80).astype(int))
    for i, (alpha, name) in enumerate(names.items()):
        curves = runs["curves"][:, i]
        inside = np.isfinite(curves).mean(0) > 0.5
        low, middle, high = np.nanquantile(curves[:, inside], [0.1, 0.5, 0.9], axis=0)
        top[1].plot(steps[inside], middle, color=COLOURS[alpha], label=name)
        top[1].fill_between(steps[inside], low, high, color=COLOURS[alpha], alpha=0.2, linewidth=0)
    top[1].set(xscale="log", title="(b) training loss (median, 80 %)", xlabel="step")
    top[1].legend(loc="lower left")
    for style, kind in (("-", "kernel"), ("--", "signs"), (":", "representation")):
        for i, alpha in enumerate(names):
            mean = np.concatenate([[1.0], np.nanmean(runs[kind][:, i], 0)])
            top[2].plot(
                [0.69, *LEVELS],
                mean,
                style,
                color=COLOURS[alpha],
                marker="o",
                markersize=3,
                label=kind if i == 0 else None,
            )
    top[2].invert_xaxis()
    top[2].set(title="(c) likeness to the start", xlabel="training loss", ylim=(0, 1.03))
    legend = top[2].legend(loc="lower left")
    for line in legend.get_lines():
        line.set_color("#555555")
    for (region, mask), colour, shift in zip(regions().items(), ("#56B4E9", "#CC79A7"), (-0.006, 0.006)):
        values = runs["difference"][..., mask.numpy()].mean(-1)
        mean, error = np.nanmean(values, 0), np.nanstd(values, 0, ddof=1) / np.sqrt(np.isfinite(values).sum(0))
        top[3].errorbar(np.array(LEVELS) + shift, mean, 2 * error, fmt="o-", color=colour, label=region, capsize=2)
    top[3].axhline(0, color="#888888", linewidth=0.8)
    top[3].invert_xaxis()
    top[3].set(title="(d) loss difference by region", xlabel="training loss")
    top[3].legend(loc="upper left")
    maps = np.nanmean(runs["difference"], 0)
    bound = np.quantile(np.abs(maps), 0.998)
    for ax, letter, level, values in zip(axes[1], "efgh", LEVELS, maps):
        shown = ax.imshow(
            GRID.image(torch.as_tensor(values)), extent=box, origin="lower", cmap="RdBu_r", vmin=-bound, vmax=bound
        )
        ax.contour(
            *[GRID.image(points[:, k]) for k in (0, 1)],
            GRID.image(yin_yang_label(points)).double(),
            [0.5],
            colors="#000000",
            linewidths=0.8,
        )
        ax.set(title=f"({letter}) at training loss {level}", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    fig.colorbar(shown, ax=axes[1], label=f"loss at alpha = 1 minus 100\nmean of {seeds} seeds", shrink=0.9)
    save(fig, path)


def main() -> None:
    """Run the seeds, print what was found, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--figure", type=Path, default=Path("out/lazy_yin_yang.png"))
    args = parser.parse_args()
    if args.workers > 1:
        with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(saved_seed, range(args.seeds)))
    else:
        results = [saved_seed(seed) for seed in range(args.seeds)]
    runs = {name: np.stack([r[name] for r in results]) for name in results[0]}
    table = {name: runs["difference"][..., mask.numpy()].mean(-1) for name, mask in regions().items()}
    print(
        f"{args.seeds} seeds: loss of alpha = 1 minus loss of alpha = 100, mean over the region, at equal training loss"
    )
    print("training loss     steps 1 / 100      easy     disks   easy < disks   kernel 1 / 100   signs 1 / 100")
    for k, level in enumerate(LEVELS):
        easy, disks = table["easy"][:, k], table["disks"][:, k]
        ok = np.isfinite(easy) & np.isfinite(disks)
        steps, kernel, signs = (np.nanmean(runs[name][:, :, k], 0) for name in ("reached", "kernel", "signs"))
        line = (
            f"{level:13.1f} {steps[0]:9.0f} /{steps[1]:6.0f} {easy[ok].mean():9.3f} {disks[ok].mean():9.3f} "
            f"{(easy[ok] < disks[ok]).mean():14.2f}"
        )
        print(f"{line} {kernel[0]:10.3f} / {kernel[1]:.3f} {signs[0]:9.3f} / {signs[1]:.3f}   ({ok.sum()} reached)")
    draw(args.figure, runs)


if __name__ == "__main__":
    main()
