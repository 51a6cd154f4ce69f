"""Where SGD stops in the plane of sharpness and non-uniformity, by learning rate and batch size.

    python examples/sgd_plane.py [--data FOLDER] [--seeds 3] [--quick]

60 MNIST digits of 7 x 7, a ReLU net of two hidden layers of 30, squared error on one-hot labels, plain SGD at two
learning rates and three batch sizes, the largest the whole set, until the loss is 1e-4 or for 10 000 steps. Sharpness
``a`` and non-uniformity ``s`` at the end, beside what linear stability allows: ``a <= 2 / lr`` and
``s <= sqrt(B (n - 1) / (n - B)) / lr``.

Protocol: Wu, Ma and E 2018, figures 4 and 5 (there FashionMNIST and CIFAR-10).
"""

from __future__ import annotations

from typing import Any

import torch
from geometry_common import COLOURS, Data, accuracy, batches, figure, mlp
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from papers_nets import images
from torch.nn import functional as F

from nngeom import analysis

PAGE = "papers.md"
RATES, BATCHES = (0.05, 0.2), ("4", "12", "all")


def run(data: Data, lr: float, size: str, most: int, seed: int) -> dict[str, Any]:
    """Train once and measure."""
    batch = len(data.x) if size == "all" else int(size)
    x, x_test = (F.adaptive_avg_pool2d(v, 7) for v in (data.x, data.x_test))
    y = F.one_hot(data.y, 10).float()
    torch.manual_seed(seed)
    model, order, step, loss = mlp(49, 30, 2), torch.Generator().manual_seed(seed), 0, 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    while step < most and loss > 1e-4:
        for bx, by in batches(x, y, batch, order):
            optimizer.zero_grad()
            (0.5 * (model(bx) - by).square().sum(1).mean()).backward()
            optimizer.step()
            step += 1
        with torch.no_grad():
            loss = float(0.5 * (model(x) - y).square().sum(1).mean())
    sharpness = float(analysis.sharpness(model, (x, y), "mse", tol=1e-3))
    spread_ = float(analysis.non_uniformity(model, (x, y), "mse", tol=0.03))
    allowed = analysis.sgd_stability(sharpness, spread_, lr, batch, len(x))
    return {
        "sharpness": sharpness,
        "non-uniformity": spread_,
        "stable": bool(allowed),
        "at most": [allowed.largest_sharpness, allowed.largest_non_uniformity],
        "loss": loss,
        "steps": step,
        "accuracy": accuracy(model, x_test, data.y_test),
    }


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A row a setting, over seeds."""
    rows = []
    for prefix in dict.fromkeys(name.rpartition("/")[0] for name in cells):
        runs = seeds_of(cells, prefix)
        row = [*prefix.split("/"), spread([r["sharpness"] for r in runs]), spread([r["at most"][0] for r in runs[:1]])]
        row += [spread([r["non-uniformity"] for r in runs]), spread([r["at most"][1] for r in runs[:1]])]
        row += [f"{sum(r['stable'] for r in runs)} of {len(runs)}"]
        rows.append([*row, spread([r["loss"] for r in runs], ".1g"), spread([r["accuracy"] for r in runs])])
    head = ["learning rate", "batch", "sharpness", "at most", "non-uniformity", "at most", "within", "loss"]
    return {"sgd_plane": table([*head, "test accuracy"], rows)}


def draw(cells: dict[str, Any], path: Any) -> None:
    """A panel a learning rate: where the runs end, and the box of each batch size."""
    fig, axes = figure(1, len(RATES), 9, 3.8)
    for ax, lr in zip(axes[0], RATES):
        for colour, batch, marker in zip(COLOURS, BATCHES, "osD"):
            runs = seeds_of(cells, f"{lr}/{batch}")
            a, s = runs[0]["at most"]
            x, y = ([r[key] for r in runs] for key in ("sharpness", "non-uniformity"))
            ax.scatter(x, y, color=colour, marker=marker, s=26, label=f"batch {batch}")
            if s is not None:
                ax.plot([0, a, a], [s, s, 0], color=colour, lw=1, ls="--")
            else:
                ax.axvline(a, color=colour, lw=1, ls="--")
        ax.set(title=f"learning rate {lr:g}", xlabel="sharpness", xlim=(0, None), ylim=(0, None))
    axes[0, 0].set(ylabel="non-uniformity")
    axes[0, 0].legend(fontsize=8, loc="lower left")
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All runs, one table, one figure."""
    args = options(__doc__, argv, steps=10_000, examples=60)
    if args.quick:
        args.steps, args.examples = 50, 15
    data = images(args.data, args.examples, 50 if args.quick else 1000)
    cells = Cells(args, "sgd_plane", steps=args.steps, examples=args.examples)
    for seed in range(args.seeds):
        for lr in RATES:
            for batch in BATCHES:
                cells.add(f"{lr}/{batch}/{seed}", lambda r=lr, b=batch, s=seed: run(data, r, b, args.steps, s))
    draw(cells.cells, args.out / "images" / "sgd_plane.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
