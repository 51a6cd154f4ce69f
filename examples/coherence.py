"""Gradients that agree: coherence on real and random labels, stiffness before and after, geometric complexity by
regulariser.

    python examples/coherence.py [--data FOLDER] [--seeds 5] [--quick]

(a) 400 8 x 8 digits, two hidden layers of 100, SGD 0.1, batches of 50, with true and with random labels: m-coherence of
the training set, and its estimate from mean gradients of batches of 40 (five partitions). (b) Class stiffness of 200
validation images at the start, after the first learning and at the end. (c) Geometric complexity after training under
several regularisers.

Protocol: Chatterjee and Zielinski 2020; Fort et al. 2019; Dherin et al. 2022.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, Data, accuracy, band, batches, corrupt, figure, load, mlp
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from nngeom import analysis, mgs
from nngeom.track import Tracker, geometric

PAGE = "analysis.md"
LABELS = ("true labels", "random labels")
KINDS = ("cosine", "sign")
ESTIMATES = {"coherence_ratio": "all examples", "partition": "batches, finite set", "iid": "batches, i.i.d."}
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


def descend(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    order: torch.Generator,
    *,
    steps: int,
    momentum: float = 0.0,
    decay: float = 0.0,
    look: Callable[[int], Any] = lambda step: None,
) -> None:
    """SGD 0.1 on batches of 50; ``look(step)`` before every step, to the end of the epoch with the last step."""
    optimizer, step = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=decay), 0
    while step <= steps:
        for x, y in batches(*batch, 50, order):
            look(step)
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
            step += 1


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


def coherence_run(data: Data, labels: str, steps: int, seed: int) -> dict[str, list[float]]:
    """m-coherence along training."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, data.y.shape, generator=g) if labels == "random labels" else data.y
    model = mlp(data.x[0].numel(), 100, 2)
    tracker = Tracker(model, [(data.x, y)], ["coherence", batch_estimates, "accuracy"], geometric(1.25))
    look = lambda step: tracker.step(step, test_accuracy=accuracy(model, data.x_test, data.y_test))
    descend(model, (data.x, y), lambda bx, by: F.cross_entropy(model(bx), by), g, steps=steps, look=look)
    return {name: tracker.history[name] for name in ("step", *ESTIMATES, "probe_accuracy", "test_accuracy")}


def stiffness_run(data: Data, steps: int, seed: int) -> dict[str, Any]:
    """Class matrices at three points of one run; the matrices themselves of the first seed."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model, found = mlp(data.x[0].numel(), 100, 2), {}
    validation = (data.x_test[:200], data.y_test[:200])

    def look(step: int) -> None:
        if step in (0, steps // 10, steps):
            seen = {kind: analysis.stiffness(model, validation, kind) for kind in KINDS}
            numbers = {kind: {"within": float(s.within), "between": float(s.between)} for kind, s in seen.items()}
            found[str(step)] = numbers | ({"by class": {k: s.by_class for k, s in seen.items()}} if seed == 0 else {})

    descend(model, (data.x, data.y), lambda bx, by: F.cross_entropy(model(bx), by), g, steps=steps, look=look)
    return found


def complexity_run(data: Data, name: str, steps: int, seed: int) -> dict[str, float]:
    """Geometric complexity and test accuracy after training under a regulariser."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    y = corrupt(data.y, 1.0, g) if name == "fixed random labels" else data.y
    model = mlp(data.x[0].numel(), 100, 2)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        y = corrupt(y, 0.3, g) if name == "fresh label noise 0.3" else y
        return F.cross_entropy(model(x), y) + penalty(model, x, y, name)

    decay = {"weight decay 1e-3": 1e-3, "weight decay 1e-2": 1e-2}.get(name, 0.0)
    descend(model, (data.x, y), loss, g, steps=steps, momentum=0.9, decay=decay)
    complexity = float(nng.analysis.geometric_complexity(model, (data.x, data.y)))
    return {"complexity": complexity, "accuracy": accuracy(model, data.x_test, data.y_test)}


def penalty(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Any:
    """The differentiable part of a regulariser."""
    if name == "spectral norm 0.01":
        return 0.01 / 2 * sum(torch.linalg.matrix_norm(p, 2).square() for p in model.parameters() if p.ndim == 2)
    if name == "flatness 0.1":
        return 0.1 * mgs.loss_gradient_penalty(model, x, y, squared=True)
    if name == "geometric complexity 1e-3":
        return 1e-3 * analysis.geometric_complexity(model, [x], differentiable=True, estimator="rademacher")
    return 0.0


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Coherence, stiffness, geometric complexity."""
    rows = []
    for labels in LABELS:
        runs = seeds_of(cells, labels)
        ratios, steps = np.array([r["coherence_ratio"] for r in runs]), runs[0]["step"]
        middle = ratios.mean(0)
        first = middle[: np.searchsorted(steps, steps[-1] / 10) + 1].argmax()
        row = [labels, spread(ratios[:, 0]), spread(ratios[:, first]), str(steps[first]), spread(ratios.max(1))]
        ends = [[r[key][-1] for r in runs] for key in ("probe_accuracy", "test_accuracy")]
        rows.append([*row, spread(ratios[:, -1]), *(spread(v) for v in ends)])
    head = ["labels", "at the start", "highest mean of the first tenth", "at step", "highest of a run", "at the end"]
    stiff, runs = [], seeds_of(cells, "stiffness")
    for step in runs[0]:
        numbers = [[r[step][kind][where] for r in runs] for kind in KINDS for where in ("within", "between")]
        stiff.append([step, *(spread(v, ".2f") for v in numbers)])
    titles = [f"{kind}, {where} classes" for kind in KINDS for where in ("within", "between")]
    complexity = []
    for name in NAMES:
        runs = seeds_of(cells, name)
        complexity.append([name, *(spread([r[key] for r in runs]) for key in ("complexity", "accuracy"))])
    return {
        "coherence": table([*head, "training accuracy", "test accuracy"], rows),
        "coherence_stiffness": table(["step", *titles], stiff),
        "coherence_complexity": table(["training", "geometric complexity", "test accuracy"], complexity),
    }


def draw_coherence(cells: dict[str, Any], path: Path) -> None:
    """Coherence by labels, accuracies, and the estimates from batches."""
    fig, axes = figure(1, 3, 11, 3.3)
    for labels, colour in zip(LABELS, COLOURS):
        runs = seeds_of(cells, labels)
        x, columns = runs[0]["step"], {name: [r[name] for r in runs] for name in runs[0]}
        band(axes[0, 0], x, columns["coherence_ratio"], labels, colour)
        band(axes[0, 1], x, columns["probe_accuracy"], f"training, {labels}", colour)
        if labels == "true labels":
            band(axes[0, 1], x, columns["test_accuracy"], "test, true labels", COLOURS[2], ls="--")
            for (key, name), shade in zip(ESTIMATES.items(), (COLOURS[0], COLOURS[3], COLOURS[4])):
                band(axes[0, 2], x, columns[key], name, shade)
    titles = (r"coherence $m\,\alpha$", "accuracy", r"$m\,\alpha$ from batches of 40, true labels")
    for ax, title in zip(axes[0], titles):
        ax.set(title=title, xlabel="step", xscale="symlog", xlim=(0, None))
        ax.legend(fontsize=7.5)
    save(fig, path)


def draw_stiffness(cells: dict[str, Any], path: Path) -> None:
    """Class matrices of the first seed, with the means over all of them."""
    runs = seeds_of(cells, "stiffness")
    fig, axes = figure(2, 3, 9, 5.6)
    for row, kind in zip(axes, KINDS):
        for ax, step in zip(row, runs[0]):
            image = ax.imshow(np.array(runs[0][step]["by class"][kind], float), vmin=-1, vmax=1, cmap="RdBu_r")
            within, between = (mean([r[step][kind][where] for r in runs]) for where in ("within", "between"))
            ax.set(title=f"{kind}, step {step}\nwithin {within:.2f}, between {between:.2f}", xticks=[], yticks=[])
    fig.colorbar(image, ax=axes, shrink=0.7)
    save(fig, path)


def fill(args: argparse.Namespace, cells: Cells) -> None:
    """All runs, a seed after the other."""
    data, steps = load(args.data, 400, 300), args.steps
    for seed in range(args.seeds):
        for labels in LABELS:
            cells.add(f"{labels}/{seed}", lambda n=labels, s=seed: coherence_run(data, n, steps, s))
        cells.add(f"stiffness/{seed}", lambda s=seed: stiffness_run(data, steps, s))
        for name in NAMES:
            cells.add(f"{name}/{seed}", lambda n=name, s=seed: complexity_run(data, n, steps, s))


def main(argv: list[str] | None = None) -> None:
    """All runs, three tables, two figures."""
    args = options(__doc__, argv, seeds=5, steps=1500)
    args.steps = 50 if args.quick else args.steps
    cells = Cells(args, "coherence", steps=args.steps)
    fill(args, cells)
    draw_coherence(cells.cells, args.out / "images" / "coherence.png")
    draw_stiffness(cells.cells, args.out / "images" / "stiffness.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
