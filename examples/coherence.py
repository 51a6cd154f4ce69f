"""Gradients that agree: coherence on real and random labels, stiffness before and after, geometric complexity by
regulariser.

    python examples/coherence.py [--data FOLDER] [--seeds 5]

(a) 400 digits, two hidden layers of 100, SGD 0.1, batches of 50, with true and with random labels: m-coherence of the
training set, and its estimate from mean gradients of batches of 40 (five partitions). (b) Class stiffness of 200
validation images at the start, after the first learning and at the end. (c) Geometric complexity after training under
several regularisers. Writes out/coherence.png, out/stiffness.png and prints (c). Protocol: Chatterjee and Zielinski
2020; Fort et al. 2019; Dherin et al. 2022.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, Data, accuracy, arguments, band, batches, corrupt, figure, load, mlp, save
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from nngeom import analysis, mgs
from nngeom.track import Tracker, geometric

NAMES = (
    "none",
    "weight decay 1e-3",
    "weight decay 1e-2",
    "spectral norm 0.01",
    "flatness 0.1",
    "fresh label noise 0.3",
    "geometric complexity 1e-3",
    "fixed random labels",
)


def batch_estimates(model: nn.Module, batches_: list[Any]) -> dict[str, float]:
    """m-coherence from mean gradients of batches of 40, over five partitions of the set, by both inverses."""
    (x, y), gradients, g = batches_[0], [], torch.Generator().manual_seed(0)
    for _ in range(5):
        for bx, by in batches(x, y, 40, g):
            grads = torch.autograd.grad(F.cross_entropy(model(bx), by), list(model.parameters()))
            gradients.append(torch.cat([t.flatten() for t in grads]).double())
    found = {
        s: analysis.coherence_from_batch_gradients(gradients, 40, examples=len(x), scheme=s)
        for s in ("partition", "iid")
    }
    return {name: float(c.ratio) for name, c in found.items()}


def coherence_run(data: Data, random: bool, steps: int, seed: int) -> dict[str, list[float]]:
    """m-coherence along training."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, data.y.shape, generator=g) if random else data.y
    model = mlp(data.x[0].numel(), 100, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = Tracker(model, [(data.x, y)], ["coherence", batch_estimates, "accuracy"], geometric(1.25))
    step = 0
    while step <= steps:
        for bx, by in batches(data.x, y, 50, g):
            tracker.step(step, test_accuracy=accuracy(model, data.x_test, data.y_test))
            optimizer.zero_grad()
            F.cross_entropy(model(bx), by).backward()
            optimizer.step()
            step += 1
    return tracker.history


def stiffness_run(data: Data, path: Any, steps: int) -> None:
    """Class matrices at three points of one run."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    model = mlp(data.x[0].numel(), 100, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    validation = (data.x_test[:200], data.y_test[:200])
    points = (0, steps // 10, steps)
    fig, axes = figure(2, 3, 9, 5.6)
    step = 0
    while step <= steps:
        for bx, by in batches(data.x, data.y, 50, g):
            if step in points:
                for row, kind in enumerate(("cosine", "sign")):
                    s = analysis.stiffness(model, validation, kind)
                    ax = axes[row, points.index(step)]
                    image = ax.imshow(s.by_class, vmin=-1, vmax=1, cmap="RdBu_r")
                    ax.set(
                        title=f"{kind}, step {step}\nwithin {float(s.within):.2f}, between {float(s.between):.2f}",
                        xticks=[],
                        yticks=[],
                    )
                    print(
                        f"stiffness {kind:6s} step {step:5d}: within {float(s.within):.3f} between "
                        f"{float(s.between):.3f} mean {float(s.mean):.3f}"
                    )
            optimizer.zero_grad()
            F.cross_entropy(model(bx), by).backward()
            optimizer.step()
            step += 1
    fig.colorbar(image, ax=axes, shrink=0.7)
    save(fig, path)


def complexity_run(data: Data, name: str, steps: int, seed: int) -> tuple[float, float]:
    """Geometric complexity and test accuracy after training under a regulariser."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    y = corrupt(data.y, 1.0, g) if name == "fixed random labels" else data.y
    model = mlp(data.x[0].numel(), 100, 2)
    decay = {"weight decay 1e-3": 1e-3, "weight decay 1e-2": 1e-2}.get(name, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
    step = 0
    while step <= steps:
        for bx, by in batches(data.x, y, 50, g):
            by = corrupt(by, 0.3, g) if name == "fresh label noise 0.3" else by
            loss = F.cross_entropy(model(bx), by) + penalty(model, bx, by, name)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return float(nng.analysis.geometric_complexity(model, (data.x, y))), accuracy(model, data.x_test, data.y_test)


def penalty(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Any:
    """The differentiable part of a regulariser."""
    if name == "spectral norm 0.01":
        return 0.01 / 2 * sum(torch.linalg.matrix_norm(p, 2).square() for p in model.parameters() if p.ndim == 2)
    if name == "flatness 0.1":
        return 0.1 * mgs.loss_gradient_penalty(model, x, y, squared=True)
    if name == "geometric complexity 1e-3":
        return 1e-3 * analysis.geometric_complexity(model, [x], differentiable=True, estimator="rademacher")
    return 0.0


def main() -> None:
    """All three parts."""
    args = arguments(__doc__, seeds=5, steps=1500)
    torch.set_num_threads(1)
    steps = args.steps // 5 if args.quick else args.steps
    data = load(args.data, 400, 300)
    fig, axes = figure(1, 3, 11, 3.3)
    for row, (name, random) in enumerate((("true labels", False), ("random labels", True))):
        runs = [coherence_run(data, random, steps, seed) for seed in range(args.seeds)]
        x, table = runs[0]["step"], lambda key, runs=runs: np.array([r[key] for r in runs])
        band(axes[0, 0], x, table("coherence_ratio"), name, COLOURS[row])
        band(axes[0, 1], x, table("probe_accuracy"), f"training, {name}", COLOURS[row])
        if not random:
            band(axes[0, 1], x, table("test_accuracy"), "test, true labels", COLOURS[2], ls="--")
            for key, colour in (("coherence_ratio", COLOURS[0]), ("partition", COLOURS[3]), ("iid", COLOURS[4])):
                band(
                    axes[0, 2],
                    x,
                    table(key),
                    {"coherence_ratio": "all examples", "partition": "batches, finite set", "iid": "batches, i.i.d."}[
                        key
                    ],
                    colour,
                )
        ratio = table("coherence_ratio").mean(0)
        print(
            f"{name}: m alpha start {ratio[0]:.2f}, highest {ratio.max():.2f} at step "
            f"{x[int(ratio.argmax())]:.0f}, end {ratio[-1]:.2f}",
            flush=True,
        )
    for ax, title in zip(
        axes[0], (r"coherence $m\,\alpha$", "accuracy", r"$m\,\alpha$ from batches of 40, true labels")
    ):
        ax.set(title=title, xlabel="step", xscale="symlog", xlim=(0, None))
        ax.legend(fontsize=7.5)
    save(fig, args.out / "coherence.png")
    stiffness_run(data, args.out / "stiffness.png", steps)
    for name in NAMES:
        found = np.array([complexity_run(data, name, steps, seed) for seed in range(args.seeds)])
        print(
            f"geometric complexity, {name:26s} {found[:, 0].mean():9.1f} +- {found[:, 0].std():.1f}   test "
            f"{found[:, 1].mean():.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
