"""Three data sets on which lazy and hasty training are solved by hand, over numerical two-layer networks.

    python examples/lazy_quadratic.py [--seeds 5]

Quadratic model f = X theta, theta = w^2 / 2, from w0 = sqrt(0.001) (closed forms as lines, the gradient flow integrated
numerically as dots) and, below, two-layer networks without constraint (100 units, linear and ReLU, initial weights
0.1 times PyTorch's, gradient descent on half the mean squared error), trained as they are and linearised at the start:

    1  x_i = sqrt(mu_i) e_i, y_i = mu_{n+1-i} / sqrt(mu_i): the two regimes learn the examples in opposite orders
    2  n = 20 examples, 5 with a wrong label on the common feature: the noisy ones come later, and first get worse
    3  n = 20 examples, 5 of a minority against a spurious feature: the minority comes later

Curves are squared errors of groups against the training loss, both relative to the start. Writes
out/lazy_quadratic.png. Source: George 2023, thesis, section 5.4 and C.7.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lazy_common import COLOURS, figure, save
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

SIGMA = 1e-3
REGIMES = {"nonlinear": COLOURS[1.0], "linear": COLOURS[100.0]}
LEVELS = torch.linspace(0.98, 0.02, 49, dtype=torch.float64)


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


def network(data: QuadraticData, groups: Groups, regime: str, activation: nn.Module, seed: int) -> Curves:
    """A dense two-layer network, as it is or linearised at the start; the step is set by its tangent kernel."""
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
    for step in range(6000):
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


def main() -> None:
    """Solve, train, tell the orders, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--figure", type=Path, default=Path("out/lazy_quadratic.png"))
    args = parser.parse_args()
    fig, axes = figure(3, 3, 9.5, 8.2)
    half = int((LEVELS - 0.5).abs().argmin())
    for column, (title, (data, groups)) in enumerate(problems().items()):
        for row, what in enumerate(("quadratic model", "two-layer linear net", "two-layer ReLU net")):
            ax = axes[row, column]
            for regime, colour in REGIMES.items():
                if row == 0:
                    curves = at_levels(quadratic(data, groups, regime))
                    dots = relative(quadratic(data, groups, regime, flow=True))
                    worst = float(quadratic_gap(data, regime).abs().max())
                else:
                    activation = nn.Identity() if row == 1 else nn.ReLU()
                    runs = [at_levels(network(data, groups, regime, activation, seed)) for seed in range(args.seeds)]
                    curves = {name: torch.stack([r[name] for r in runs]).nanmean(0) for name in groups.members}
                for name, style in zip(groups.members, ("-", "--", ":")):
                    ax.plot(LEVELS, curves[name], style, color=colour, label=name if regime == "linear" else None)
                    if row == 0:
                        ax.plot(dots["loss"], dots[name], ".", color=colour, markersize=4)
                found = ", ".join(f"{name} {float(curves[name][half]):.2f}" for name in groups.members)
                note = f"   closed form - flow {worst:.0e}" if row == 0 else f"   {args.seeds} seeds"
                print(f"{title:26s} {what:20s} {regime:10s} error at half the loss: {found}{note}")
            ax.set(title=title if row == 0 else "", xlim=(1.0, 0.0), ylim=(0, None))
            if column == 0:
                ax.set_ylabel(f"{what}\nerror of the group / its start")
            if row == 0:
                for line in ax.legend(handlelength=2.4, loc="lower left" if column == 0 else "upper right").get_lines():
                    line.set_color("#555555")
            if row == 2:
                ax.set_xlabel("training loss / its start")
    lines = [axes[0, 0].plot([], [], color=colour, label=regime)[0] for regime, colour in REGIMES.items()]
    fig.legend(handles=lines, loc="outside upper center", ncols=2)
    save(fig, args.figure)


def quadratic_gap(data: QuadraticData, regime: str) -> Tensor:
    """Closed form minus integrated flow, in ``theta``."""
    w0 = torch.full((data.X.shape[1],), SIGMA**0.5, dtype=torch.float64)
    times = torch.linspace(0, 2 if regime == "nonlinear" else 100, 12, dtype=torch.float64)
    return quadratic_modes(data.X, data.y, w0, times, regime) - gradient_flow(data.X, data.y, w0, times, regime)


if __name__ == "__main__":
    main()
