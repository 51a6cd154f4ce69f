"""Weak gradients suppressed: winsorized descent on six features, and on MNIST by level and label noise.

    python examples/winsorized_sgd.py [--data FOLDER] [--seeds 3] [--quick]

(a) The motivating example: a linear model in six features, four training examples and one of the test; each has a
feature of its own, and in the "real" data the sixth agrees with every label. Gradient descent, and descent on gradients
winsorized at 30 %, which drops what single examples ask for.
(b) 300 MNIST digits of 14 x 14, a part with flipped labels; one hidden layer of 50, batches of 50, SGD 0.05 with
momentum 0.9, 400 steps at every level of winsorizing. Accuracy on the training labels as given, and on the test.

Protocol: Walker 2023, sections 5.1 and 5.5; Chatterjee and Zielinski 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from geometry_common import COLOURS, Data, accuracy, band, batches, corrupt, figure, mlp
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from papers_nets import images
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

PAGE = "papers.md"
LEVELS = (0.0, 5.0, 25.0)
NOISES = (0.0, 0.5)
SIGNS = (1.0, -1.0, -1.0, 1.0, -1.0)
EVERY = 50


def six(real: bool) -> tuple[Tensor, Tensor]:
    """Five examples of six features, and targets."""
    y = torch.tensor(SIGNS, dtype=torch.float64)
    x = torch.zeros(5, 6, dtype=torch.float64)
    x[range(5), range(5)] = y
    x[:, 5] = y if real else 0.0
    return x, y[:, None]


def six_features(real: bool, level: float, steps: int = 200) -> dict[str, Any]:
    """Training and test loss along descent from zero, and the weights at its end."""
    x, y = six(real)
    model = nn.Linear(6, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = nng.optim.WinsorizedSGD(model, lr=0.1, level=level)
    losses: dict[str, Any] = {"train": [], "test": []}
    for _ in range(steps):
        with torch.no_grad():
            each = 0.5 * (model(x) - y).square()[:, 0]
        losses["train"].append(float(each[:4].mean()))
        losses["test"].append(float(each[4]))
        optimizer.zero_grad()
        with optimizer.observe():
            (0.5 * (model(x[:4]) - y[:4]).square().mean()).backward()
        optimizer.step()
    return {**losses, "weights": model.weight.detach()[0]}


def trained(data: Data, noise: float, level: float, steps: int, seed: int) -> dict[str, list[float]]:
    """Accuracies along one training."""
    torch.manual_seed(seed)
    order, y = torch.Generator().manual_seed(seed), corrupt(data.y, noise, torch.Generator().manual_seed(seed))
    x, x_test = (F.adaptive_avg_pool2d(v, 14) for v in (data.x, data.x_test))
    model, step = mlp(196, 50, 1), 0
    optimizer = nng.optim.WinsorizedSGD(model, lr=0.05, level=level, momentum=0.9)
    seen: dict[str, list[float]] = {"train": [], "test": []}
    while True:
        for bx, by in batches(x, y, 50, order):
            if step % EVERY == 0:
                seen["train"].append(accuracy(model, x, y))
                seen["test"].append(accuracy(model, x_test, data.y_test))
            if step == steps:
                return seen
            optimizer.zero_grad()
            with optimizer.observe():
                F.cross_entropy(model(bx), by).backward()
            optimizer.step()
            step += 1


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Six features; then a row a level, two columns a noise."""
    rows = []
    for data in ("real", "random"):
        for name in ("mean", "winsorized"):
            found = cells[f"six features/{data}/{name}"]
            row = [data, name, f"{found['train'][-1]:.2g}", f"{found['test'][-1]:.2g}"]
            rows.append([*row, f"{found['weights'][5]:.2f}", f"{found['weights'][0]:.2f}"])
    head = ["data", "gradient", "training loss", "test loss", "weight of the shared feature", "of a feature of one"]
    six_rows = table(head, rows)
    rows = []
    for level in LEVELS:
        runs = [seeds_of(cells, f"{noise}/{level}") for noise in NOISES]
        columns = [[spread([r[part][-1] for r in line]) for part in ("train", "test")] for line in runs]
        best = spread([max(r["test"]) for r in runs[-1]])
        rows.append([f"{level:g} %", *(cell for pair in columns for cell in pair), best])
    head = [f"{part}, {100 * noise:g} % noise" for noise in NOISES for part in ("training", "test")]
    head.append(f"best test, {100 * NOISES[-1]:g} % noise")
    return {"winsorized_six": six_rows, "winsorized_sgd": table(["level", *head], rows)}


def draw(cells: dict[str, Any], path: Any) -> None:
    """Six features; test and training accuracy along training, a panel a noise."""
    fig, axes = figure(1, 1 + len(NOISES), 11, 3.4)
    for colour, (data, name) in zip(COLOURS, [(d, n) for d in ("real", "random") for n in ("mean", "winsorized")]):
        found = cells[f"six features/{data}/{name}"]
        axes[0, 0].plot(found["test"], color=colour, label=f"{data}, {name}")
    axes[0, 0].set(title="six features: test loss", xlabel="step", xscale="symlog", ylim=(-0.02, 0.75))
    for ax, noise in zip(axes[0, 1:], NOISES):
        for colour, level in zip(COLOURS, LEVELS):
            runs = seeds_of(cells, f"{noise}/{level}")
            steps = [EVERY * j for j in range(len(runs[0]["test"]))]
            band(ax, steps, [r["test"] for r in runs], f"level {level:g} %, test", colour)
            band(ax, steps, [r["train"] for r in runs], "", colour, ls=":")
        ax.set(title=f"accuracy, {100 * noise:g} % noise", xlabel="step (dotted: training labels)", ylim=(0, 1.02))
    axes[0, 1].legend(fontsize=7.5, loc="lower right")
    axes[0, 0].legend(fontsize=7.5)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """Six features and all nets, two tables, one figure."""
    args = options(__doc__, argv, steps=400, examples=300)
    if args.quick:
        args.steps, args.examples = EVERY, 60
    data = images(args.data, args.examples, 20 if args.quick else 1000)
    cells = Cells(args, "winsorized_sgd", steps=args.steps, examples=args.examples)
    for kind in ("real", "random"):
        for name, level in (("mean", 0.0), ("winsorized", 30.0)):
            cells.add(f"six features/{kind}/{name}", lambda k=kind, v=level: six_features(k == "real", v))
    for seed in range(args.seeds):
        for noise in NOISES:
            for level in LEVELS:
                run = lambda n=noise, v=level, s=seed: trained(data, n, v, args.steps, s)
                cells.add(f"{noise}/{level}/{seed}", run)
    draw(cells.cells, args.out / "images" / "winsorized_sgd.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
