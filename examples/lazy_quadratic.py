"""Three data sets on which lazy and hasty training are solved by hand, over numerical two-layer networks.

    python examples/lazy_quadratic.py [--seeds 5] [--quick]

Quadratic model f = X theta, theta = w^2 / 2, from w0 = sqrt(0.001) (closed forms as lines, the gradient flow integrated
numerically as dots) and, below, two-layer networks without constraint (100 units, linear and ReLU, initial weights
0.1 times PyTorch's, gradient descent on half the mean squared error), trained as they are and linearised at the start:

    1  x_i = sqrt(mu_i) e_i, y_i = mu_{n+1-i} / sqrt(mu_i): the two regimes learn the examples in opposite orders
    2  n = 20 examples, 5 with a wrong label on the common feature: the noisy ones come later, and first get worse
    3  n = 20 examples, 5 of a minority against a spurious feature: the minority comes later

Curves are squared errors of groups against the training loss, both relative to the start.

Source: George 2023, thesis, section 5.4 and C.7.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from geometry_common import band
from lazy_common import COLOURS, figure, save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from torch import Tensor, nn

import nngeom as nng
from nngeom.linearized import (
    Curves,
    Groups,
    Linearized,
    QuadraticData,
    equal_progress,
    gradient_flow,
    groups_by_flag,
    label_noise,
    quadratic_modes,
    reversed_modes,
    singular_modes,
    spurious_feature,
)

PAGE = "linearized.md"
SIGMA = 1e-3
REGIMES = {"nonlinear": COLOURS[1.0], "linear": COLOURS[100.0]}
LEVELS = torch.linspace(0.98, 0.02, 49, dtype=torch.float64)
HALF = 24  # the level of half the loss
NETS = {"linear net": nn.Identity(), "ReLU net": nn.ReLU()}


def problems() -> dict[str, tuple[QuadraticData, Groups]]:
    """The data and the groups followed in each."""
    one = reversed_modes(torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0], dtype=torch.float64))
    two, three = label_noise(20, 5, 2.0, 200), spurious_feature(20, 5, 0.5, 2.0, 200)
    return {
        "1: opposite correlations": (one, Groups({f"example {i + 1}": torch.tensor([i]) for i in (0, 2, 4)})),
        "2: label noise": (two, groups_by_flag(~two.typical)),
        "3: spurious feature": (three, groups_by_flag(~three.typical, ("majority", "minority"))),
    }


def relative(run: Curves) -> dict[str, Tensor]:
    """Every curve divided by its start."""
    return {name: run[name] / run[name][0] for name in run}


def errors(predictions: Tensor, data: QuadraticData, groups: Groups) -> Curves:
    """Losses ``predictions (times, n)`` make, whole and by group."""
    run = Curves()
    for f in predictions:
        each = 0.5 * (f - data.y).square()
        run.record(loss=each.mean(), **groups.means(each))
    return run


def quadratic(data: QuadraticData, groups: Groups, regime: str, flow: bool = False) -> Curves:
    """The quadratic model in closed form, or by integration."""
    modes = singular_modes(data.X, data.y)
    w0 = torch.full_like(modes.mu, SIGMA**0.5)
    live = modes.mu > 0
    slowest = (
        (SIGMA * modes.mu[live]).min()
        if regime == "linear"
        else 2 * (modes.mu.sqrt() * modes.target)[modes.target > 1e-9].min()
    )
    horizon = (8.0 if regime == "linear" else 14.0) / float(slowest)
    times = torch.linspace(0, horizon, 60 if flow else 6000, dtype=torch.float64)
    theta = (gradient_flow if flow else quadratic_modes)(data.X, data.y, w0, times, regime)
    return errors(modes.predict(data.X, theta), data, groups)


def network(problem: tuple[QuadraticData, Groups], regime: str, activation: nn.Module, steps: int, seed: int) -> Curves:
    """A dense two-layer network, as it is or linearised at the start; the step is set by its tangent kernel."""
    data, groups = problem
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(data.X.shape[1], 100, bias=False), activation, nn.Linear(100, 1, bias=False)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.1)
    n, targets = len(data.y), data.y[:, None]
    if regime == "linear":
        top = nng.GramMatrix(model, (data.X,)).eigh()[0][-1]
        model, lr = Linearized(model), float(0.1 * n / top)
    else:  # the kernel grows with the weights: to about twice the norm of the solution times that of the data
        largest = torch.linalg.matrix_norm(data.X, 2)
        lr = 0.1 * n / float(largest * data.y.norm() + largest**2)
    optimizer, run = torch.optim.SGD(model.parameters(), lr=lr), Curves()
    for step in range(steps):
        optimizer.zero_grad()
        each = 0.5 * (model(data.X) - targets).square()[:, 0]
        each.mean().backward()
        if step < 50 or step % 5 == 0:
            run.record(loss=each.mean(), **groups.means(each))
            if run.columns["loss"][-1] < 0.01 * run.columns["loss"][0]:
                break
        optimizer.step()
    return run


def at_levels(run: Curves) -> dict[str, Tensor]:
    """Relative curves at relative losses."""
    curves = relative(run)
    return equal_progress(curves, curves, LEVELS).a


def quadratic_gap(data: QuadraticData, regime: str) -> Tensor:
    """Closed form minus integrated flow, in ``theta``."""
    w0 = torch.full((data.X.shape[1],), SIGMA**0.5, dtype=torch.float64)
    times = torch.linspace(0, 2 if regime == "nonlinear" else 100, 12, dtype=torch.float64)
    return quadratic_modes(data.X, data.y, w0, times, regime) - gradient_flow(data.X, data.y, w0, times, regime)


def fill(cells: Cells, seeds: int, steps: int) -> None:
    """The quadratic model of every problem in both regimes, and all nets."""
    for title, problem in problems().items():
        for regime in REGIMES:
            cells.add(f"{title}/{regime}", lambda p=problem, r=regime: solved(*p, r))
            for what, activation in NETS.items():
                for seed in range(seeds):
                    compute = lambda p=problem, r=regime, a=activation, s=seed: at_levels(network(p, r, a, steps, s))
                    cells.add(f"{title}/{regime}/{what}/{seed}", compute)


def solved(data: QuadraticData, groups: Groups, regime: str) -> dict[str, Any]:
    """Closed form, integrated flow, the largest difference between them."""
    flow = relative(quadratic(data, groups, regime, flow=True))
    gap = float(quadratic_gap(data, regime).abs().max())
    return {"closed": at_levels(quadratic(data, groups, regime)), "flow": flow, "gap": gap}


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Errors of the groups at half the loss, by problem and regime."""
    rows = []
    for title, (_, groups) in problems().items():
        for regime in REGIMES:
            for group in groups.members:
                name = f"{title}/{regime}"
                row = [title, regime, group, spread([cells[name]["closed"][group][HALF]])]
                nets = (seeds_of(cells, f"{name}/{what}") for what in NETS)
                rows.append([*row, *(spread([r[group][HALF] for r in runs]) for runs in nets)])
    return {"lazy_quadratic": table(["problem", "regime", "group", "quadratic model", *NETS], rows)}


def draw(cells: dict[str, Any], path: Path) -> None:
    """A problem a column; the quadratic model, closed forms as lines and flows as dots, above nets of two kinds."""
    fig, axes = figure(3, 3, 9.5, 8.2)
    for column, (title, (_, groups)) in zip(axes.T, problems().items()):
        for regime, colour in REGIMES.items():
            found = cells[f"{title}/{regime}"]
            for name, style in zip(groups.members, ("-", "--", ":")):
                label = name if regime == "linear" else None
                column[0].plot(LEVELS, found["closed"][name], style, color=colour, label=label)
                column[0].plot(found["flow"]["loss"], found["flow"][name], ".", color=colour, markersize=4)
                for ax, what in zip(column[1:], NETS):
                    runs = [r[name] for r in seeds_of(cells, f"{title}/{regime}/{what}")]
                    known = [k for k in range(len(LEVELS)) if all(r[k] is not None for r in runs)]
                    band(ax, LEVELS[known], [[r[k] for k in known] for r in runs], "", colour, ls=style)
        for ax in column:
            ax.set(xlim=(1.0, 0.0), ylim=(0, None))
        column[0].set(title=title)
        column[2].set(xlabel="training loss / its start")
        corner = "lower left" if title.startswith("1") else "upper right"
        for line in column[0].legend(handlelength=2.4, loc=corner).get_lines():
            line.set_color("#555555")
    for ax, what in zip(axes[:, 0], ("quadratic model", *(f"two-layer {what}" for what in NETS))):
        ax.set_ylabel(f"{what}\nerror of the group / its start")
    lines = [axes[0, 0].plot([], [], color=colour, label=regime)[0] for regime, colour in REGIMES.items()]
    fig.legend(handles=lines, loc="outside upper center", ncols=2)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """Solve and train, one table, one figure."""
    args = options(__doc__, argv, seeds=5, steps=6000)
    args.steps = 100 if args.quick else args.steps
    cells = Cells(args, "lazy_quadratic", steps=args.steps)
    fill(cells, args.seeds, args.steps)
    draw(cells.cells, args.out / "images" / "lazy_quadratic.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
