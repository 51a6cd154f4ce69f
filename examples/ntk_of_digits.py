"""The tangent kernel along training on digits: spectrum, effective rank, alignment; label noise, easy and hard, depth.

    python examples/ntk_of_digits.py [--data FOLDER] [--seeds 3]

(a) 1000 digits, 0 or 50 % flipped labels, 5 hidden layers of 80, SGD 0.02 with momentum 0.9: kernels of 50 training and
50 test images. (b) 1400 digits of which 140 carry random labels: alignment of the kernel restricted to easy and to
difficult ones, for depth 2, 4 and 6. Writes out/ntk_of_digits.png, out/ntk_depth.png and the dashboard of one run,
out/ntk_dashboard.png.

Protocol: Baratin et al. 2021, figs 2-4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, Data, accuracy, arguments, band, batches, corrupt, figure, load, mlp, save
from torch.nn import functional as F

import nngeom as nng
from nngeom.analysis import group_alignment
from nngeom.track import Tracker, geometric

PROBE = ("effective_rank", "trace_ratios", "alignment")
ALL = (*PROBE, "loss", "accuracy", "spectrum", "alignment_by_layer", "mgs", "coherence")


def noisy_run(data: Data, noise: float, steps: int, seed: int, dashboard: Path | None = None) -> dict[str, Any]:
    """One run with kernels of training and test points."""
    torch.manual_seed(seed)
    order, y = torch.Generator().manual_seed(seed), corrupt(data.y, noise, torch.Generator().manual_seed(seed))
    model = mlp(data.x[0].numel(), 80, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    train = Tracker(model, [(data.x[:50], y[:50])], PROBE, geometric(1.35))
    test = Tracker(model, [(data.x_test[:50], data.y_test[:50])], ALL if dashboard else PROBE, geometric(1.35))
    step = 0
    while step <= steps:
        for bx, by in batches(data.x, y, 100, order):
            loss = F.cross_entropy(model(bx), by)
            if train.step(step, train_loss=float(loss.detach())) is not None:
                scores = {
                    "train_accuracy": accuracy(model, data.x, y),
                    "test_accuracy": accuracy(model, data.x_test, data.y_test),
                }
                test.step(step, train_loss=float(loss.detach()), **scores)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    if dashboard:
        test.plot(dashboard, title="A net of five hidden layers learns digits: probe of 50 test images")
        print(f"wrote {dashboard}; the full dashboard took {100 * test.overhead:.0f} % of the run")
    return {"train": train.history, "test": test.history}


def depth_run(data: Data, depth: int, steps: int, seed: int) -> dict[str, list[float]]:
    """Alignment of easy and difficult training points along training."""
    torch.manual_seed(seed)
    order, g = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    y = data.y.clone()
    y[:140] = torch.randint(0, 10, (140,), generator=g)
    probe = [(data.x[90:190], y[90:190])]
    groups = {"difficult": torch.arange(50), "easy": torch.arange(50, 100)}
    model = mlp(data.x[0].numel(), 60, depth)

    def hierarchy(model, batches):
        return group_alignment(nng.GramMatrix(model, batches, check=False), y[90:190], groups)

    tracker = Tracker(model, probe, [hierarchy], geometric(1.35))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    step = 0
    while step <= steps:
        for bx, by in batches(data.x, y, 100, order):
            tracker.step(step)
            optimizer.zero_grad()
            F.cross_entropy(model(bx), by).backward()
            optimizer.step()
            step += 1
    return tracker.history


def main() -> None:
    """All runs, three figures."""
    args = arguments(__doc__, seeds=3, steps=4000)
    torch.set_num_threads(1)
    steps = args.steps // 5 if args.quick else args.steps
    data = load(args.data, 1000, 300)
    fig, axes = figure(2, 4, 12, 5.6)
    for row, noise in enumerate((0.0, 0.5)):
        runs = [
            noisy_run(data, noise, steps, seed, args.out / "ntk_dashboard.png" if seed == noise == 0 else None)
            for seed in range(args.seeds)
        ]
        x = runs[0]["train"]["step"]
        column = lambda part, key, runs=runs: np.array([r[part][key] for r in runs])
        ax = axes[row]
        band(ax[0], x, column("test", "train_accuracy"), "training labels", COLOURS[0])
        band(ax[0], x, column("test", "test_accuracy"), "test", COLOURS[1])
        for part, colour in (("train", COLOURS[0]), ("test", COLOURS[1])):
            for a, key in zip(ax[1:], ("effective_rank", "trace_ratio_40", "alignment")):
                band(a, x, column(part, key), f"{part} points", colour)
        for a, title in zip(ax, ("accuracy", "effective rank", "trace in the top 40 of 500", "CKA with the labels")):
            a.set(title=f"{title}, {100 * noise:.0f} % noise", xlabel="step", xscale="symlog", xlim=(0, None))
            a.legend(fontsize=7.5)
        test = column("test", "test_accuracy").mean(0)
        for part in ("train", "test"):
            rank, cka = column(part, "effective_rank").mean(0), column(part, "alignment").mean(0)
            low = int(rank.argmin())
            print(
                f"noise {noise}: {part:5s} effective rank start {rank[0]:.0f}, lowest {rank[low]:.0f} at step "
                f"{x[low]:.0f}, end {rank[-1]:.0f}",
                end="; ",
            )
            print(f"CKA start {cka[0]:.3f}, highest {cka.max():.3f}, end {cka[-1]:.3f}")
        print(
            f"noise {noise}: test accuracy best {test.max():.3f} at step {x[int(test.argmax())]:.0f}, end "
            f"{test[-1]:.3f}",
            flush=True,
        )
    save(fig, args.out / "ntk_of_digits.png")
    data = load(args.data, 1400, 300)
    fig, axes = figure(1, 4, 12, 3)
    for j, depth in enumerate((2, 4, 6)):
        runs = [depth_run(data, depth, steps // 2, seed) for seed in range(args.seeds)]
        x = runs[0]["step"]
        easy, hard = (np.array([r[key] for r in runs]) for key in ("easy", "difficult"))
        band(axes[0, j], x, easy, "easy", COLOURS[2])
        band(axes[0, j], x, hard, "random labels", COLOURS[3])
        band(axes[0, 3], x, easy / hard, f"depth {depth}", COLOURS[j])
        axes[0, j].set(title=f"CKA with the labels, depth {depth}", ylim=(0, 0.16))
        ratio = (easy / hard).mean(0)
        at = x[int(ratio.argmax())]
        print(f"depth {depth}: CKA highest easy {easy.mean(0).max():.3f}, difficult {hard.mean(0).max():.3f}", end="; ")
        print(f"ratio highest {ratio.max():.1f} at step {at:.0f}", flush=True)
    axes[0, 3].set(title="easy / difficult")
    for ax in axes[0]:
        ax.set(xlabel="step", xscale="symlog", xlim=(0, None))
        ax.legend(fontsize=7.5)
    save(fig, args.out / "ntk_depth.png")


if __name__ == "__main__":
    main()
