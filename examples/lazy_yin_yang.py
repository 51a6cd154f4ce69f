"""Where a network is ahead of its linearisation: yin-yang data, loss-difference maps at equal training loss.

    python examples/lazy_yin_yang.py [--seeds 100] [--quick]

For every seed: 100 points of the yin-yang data, a 4-layer ReLU network (2-60-60-60-1, PyTorch's initialisation),
full-batch gradient descent (learning rate 0.05, momentum 0.9, logistic loss, float64) with alpha = 1 and, from the same
start, with alpha = 100. Both runs are read where their training loss first reaches 0.6, 0.5, 0.4 and 0.3; the map shows
the loss of alpha = 1 minus that of alpha = 100 on a grid, averaged over the seeds.

Protocol: George 2023, thesis, section 5.3.1 and fig. 5.1.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lazy_common import COLOURS, descend, figure, save
from optimizer_tables import table
from papers_common import Cells, mean, options, place, rounded, seeds_of, spread
from torch import Tensor, nn
from torch.nn import functional as F

from nngeom.linearized import Grid, equal_progress, in_disks, linearity, yin_yang, yin_yang_label

PAGE = "linearized.md"
LEVELS = [0.6, 0.5, 0.4, 0.3]
GRID = Grid(-1, 1, 40)
LIKENESS = ("kernel", "signs", "representation")
ALPHAS = (1.0, 100.0)


def logistic(outputs: Tensor, y: Tensor) -> Tensor:
    """``(n,)`` losses of one logit each."""
    return F.binary_cross_entropy_with_logits(outputs[:, 0], y.double(), reduction="none")


def regions() -> dict[str, Tensor]:
    """Grid points in the disks, and those farther than 0.5 from any point of the other class."""
    points = GRID.points.double()
    label = yin_yang_label(points)
    distance = torch.cdist(points, points)
    distance[label[:, None] == label[None]] = torch.inf
    return {"easy": distance.amin(1) > 0.5, "disks": in_disks(points)}


def shown_steps(steps: int) -> np.ndarray:
    """Where the curves of the training loss are kept."""
    return np.unique(np.geomspace(1, steps, 50).astype(int))


def one_seed(seed: int, steps: int) -> tuple[Tensor, dict[str, Any]]:
    """Both regimes from one start: the map of differences ``(levels, points)``, NaN where a level is not reached by
    both, and by regime at each level the steps and how like the start the net is; means of the map; training losses.
    """
    torch.manual_seed(seed)
    x, y = yin_yang(100, torch.Generator().manual_seed(seed))
    x, points = x.double(), GRID.points.double()
    target = yin_yang_label(points)
    layers = [nn.Linear(2, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 1)]
    model = nn.Sequential(*layers).double()

    def measure(scaled: nn.Module, each: Tensor) -> dict[str, Any]:
        now = linearity(scaled, None, [(x, y)])
        likeness = {"signs": now.sign_similarity, "kernel": now.kernel_alignment}
        return {
            "grid": logistic(scaled(points), target),
            **likeness,
            "representation": now.representation_alignment,
        }

    runs = [descend(model, a, x, y, logistic, measure, lr=0.05, every=0.03, until=0.28, steps=steps) for a in ALPHAS]
    both = equal_progress(*runs, LEVELS)
    found: dict[str, Any] = {name: [both.a[name], both.b[name]] for name in ("step", *LIKENESS)}
    difference = both.difference("grid")
    found |= {name: difference[:, mask].mean(1) for name, mask in regions().items()}
    found["curves"] = [np.interp(shown_steps(steps), r["step"], r["loss"], right=np.nan).tolist() for r in runs]
    return difference, found


def averaged(so_far: dict[str, Any] | None, difference: Tensor) -> dict[str, Any]:
    """The mean map of the seeds so far and of one more, level by level over those that reached it."""
    total, count = torch.zeros_like(difference), torch.zeros(len(LEVELS), 1, dtype=difference.dtype)
    if so_far:
        count = torch.tensor(so_far["seeds"], dtype=difference.dtype)[:, None]
        total = torch.tensor(so_far["mean"], dtype=difference.dtype) * count
    reached = difference.isfinite().all(1, keepdim=True)
    count = count + reached
    return {"mean": (total + difference.nan_to_num()) / count.clamp_min(1), "seeds": count[:, 0].int()}


def fill(cells: Cells, seeds: int, steps: int) -> None:
    """All seeds in turn; ``maps`` is the mean over those that are there."""

    def compute(seed: int) -> dict[str, Any]:
        difference, found = one_seed(seed, steps)
        cells.cells["maps"] = rounded(averaged(cells.cells.get("maps"), difference))
        return found

    for seed in range(seeds):
        cells.add(f"seed/{seed}", lambda s=seed: compute(s))


def plain(values: list[float | None], form: str) -> str:
    """The mean of what is there."""
    return "-" if math.isnan(mean(values)) else f"{mean(values):{form}}"


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A level a row: the regions, steps and likeness to the start in both regimes."""
    runs, rows = seeds_of(cells, "seed"), []
    for k, level in enumerate(LEVELS):
        both = lambda name, form, k=k: " / ".join(plain([r[name][i][k] for r in runs], form) for i in (0, 1))
        easy, disks = ([r[name][k] for r in runs if r["easy"][k] is not None] for name in ("easy", "disks"))
        lower = [float(a < b) for a, b in zip(easy, disks)]
        row = [f"{level:g}", both("step", ".0f"), spread(easy, ".2g"), spread(disks, ".2g")]
        rows.append([*row, plain([100 * v for v in lower], ".0f"), both("kernel", ".3f"), both("signs", ".3f")])
    head = ["training loss", "steps, 1 / 100", "easy", "disks", "easy < disks, % of seeds"]
    return {"lazy_yin_yang": table([*head, "kernel alignment, 1 / 100", "signs kept, 1 / 100"], rows)}


def array(runs: list[Any], name: str) -> np.ndarray:
    """What all seeds have under a name, ``(seeds, ...)``, NaN where there is nothing."""
    return np.array([r[name] for r in runs], dtype=float)


def draw(cells: dict[str, Any], path: Path, steps: int) -> None:
    """Data, curves, linearity, regions above; the four maps below."""
    fig, axes = figure(4, 2, 8, 13)
    axes = axes.reshape(2, 4)
    runs, box = seeds_of(cells, "seed"), [-1, 1, -1, 1]
    draw_data(axes[0, 0], box)
    draw_curves(axes[0, 1], array(runs, "curves"), shown_steps(steps))
    draw_likeness(axes[0, 2], runs)
    draw_regions(axes[0, 3], runs)
    points, maps = GRID.points, torch.tensor(cells["maps"]["mean"])
    bound = max(float(maps.abs().quantile(0.998)), 1e-6)
    for ax, letter, level, values in zip(axes[1], "efgh", LEVELS, maps):
        shown = ax.imshow(GRID.image(values), extent=box, origin="lower", cmap="RdBu_r", vmin=-bound, vmax=bound)
        boundary = GRID.image(yin_yang_label(points)).double()
        ax.contour(*[GRID.image(points[:, k]) for k in (0, 1)], boundary, [0.5], colors="#000000", linewidths=0.8)
        ax.set(title=f"({letter}) at training loss {level}", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    fig.colorbar(shown, ax=axes[1], label=f"loss at alpha = 1 minus 100\nmean of {len(runs)} seeds", shrink=0.9)
    save(fig, path)


def draw_data(ax: Any, box: list[int]) -> None:
    """The classes and the points of one seed."""
    x, y = yin_yang(100, torch.Generator().manual_seed(0))
    ax.imshow(GRID.image(yin_yang_label(GRID.points)), extent=box, origin="lower", cmap="Greys", vmax=3)
    for c, marker, colour in ((0, "o", "#ffffff"), (1, "s", "#000000")):
        ax.scatter(*x[y == c].T, s=12, marker=marker, c=colour, edgecolors="#000000", linewidths=0.6)
    ax.set(title="(a) classes and one data set", xticks=[-1, 0, 1], yticks=[-1, 0, 1])


def draw_curves(ax: Any, curves: np.ndarray, steps: np.ndarray) -> None:
    """Training losses ``(seeds, 2, steps)``, as long as most seeds have not ended."""
    for alpha, values in zip(ALPHAS, curves.swapaxes(0, 1)):
        inside = np.isfinite(values).mean(0) > 0.5
        low, middle, high = np.nanquantile(values[:, inside], [0.1, 0.5, 0.9], axis=0)
        ax.plot(steps[inside], middle, color=COLOURS[alpha], label=f"alpha = {alpha:g}")
        ax.fill_between(steps[inside], low, high, color=COLOURS[alpha], alpha=0.2, linewidth=0)
    ax.set(xscale="log", title="(b) training loss (median, 80 %)", xlabel="step")
    ax.legend(loc="lower left")


def draw_likeness(ax: Any, runs: list[Any]) -> None:
    """Means over seeds, from 1 at the start."""
    for style, kind in zip(("-", "--", ":"), LIKENESS):
        for i, alpha in enumerate(ALPHAS):
            means = [1.0, *(mean([r[kind][i][k] for r in runs]) for k in range(len(LEVELS)))]
            name = kind if i == 0 else None
            ax.plot([0.69, *LEVELS], means, style, color=COLOURS[alpha], marker="o", markersize=3, label=name)
    ax.invert_xaxis()
    ax.set(title="(c) likeness to the start", xlabel="training loss", ylim=(0, 1.03))
    for line in ax.legend(loc="lower left").get_lines():
        line.set_color("#555555")


def draw_regions(ax: Any, runs: list[Any]) -> None:
    """Mean differences, with two standard errors, by region."""
    for region, colour, shift in zip(regions(), ("#56B4E9", "#CC79A7"), (-0.006, 0.006)):
        known = [v[np.isfinite(v)] for v in array(runs, region).T]
        means = [v.mean() if len(v) else np.nan for v in known]
        errors = [2 * v.std(ddof=1) / len(v) ** 0.5 if len(v) > 1 else np.nan for v in known]
        ax.errorbar(np.array(LEVELS) + shift, means, errors, fmt="o-", color=colour, label=region, capsize=2)
    ax.axhline(0, color="#888888", linewidth=0.8)
    ax.invert_xaxis()
    ax.set(title="(d) difference by region, 2 standard errors", xlabel="training loss")
    ax.legend(loc="upper left")


def main(argv: list[str] | None = None) -> None:
    """All seeds, one table, one figure."""
    args = options(__doc__, argv, seeds=100, steps=12000)
    args.steps = 60 if args.quick else args.steps
    cells = Cells(args, "lazy_yin_yang", steps=args.steps)
    fill(cells, args.seeds, args.steps)
    draw(cells.cells, args.out / "images" / "lazy_yin_yang.png", args.steps)
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
