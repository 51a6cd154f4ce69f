"""Wrong labels found by self-influence: representations of the Fisher matrix and simpler scores, along training.

    python examples/mislabelled_images.py [--data FOLDER] [--model resnet-gn] [--seeds 3] [--quick]

1000 MNIST digits, a tenth of whose labels are flipped. A residual net with group normalisation learns them; at three
points of training, up to where it has memorised the wrong labels, each training example is scored by its self-influence
``g_i^T (F + x)^-1 g_i`` under the Fisher matrix in several representations, by the norm of its gradient, by its loss.
The area under the curve of wrong labels found against right ones shown.

Protocol: Koh and Liang 2017, section 5.4; Pruthi et al. 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from geometry_common import COLOURS, Data, band, corrupt, figure
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread
from papers_nets import descend, images, network
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

PAGE = "papers.md"
SHARE, RELATIVE_DAMPING = 0.1, 0.1
FORMS = {"Diag": nng.PMatDiag, "KFAC": nng.PMatKFAC, "EKFAC": nng.PMatEKFAC}


def area(score: Tensor, wrong: Tensor) -> float:
    """The chance that a wrong label has a higher score than a right one, ties as a half."""
    score = score.double()
    difference = score[wrong][:, None] - score[~wrong][None]
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


def scores(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """A number an example, by every method: high where the label is in doubt."""
    loader = [(x[lo : lo + 100], y[lo : lo + 100]) for lo in range(0, len(x), 100)]
    with torch.no_grad():
        logits = torch.cat([model(bx) for bx, _ in loader])
    found = {"loss": F.cross_entropy(logits, y, reduction="none")}
    found["gradient norm"] = nng.GramMatrix(model, loader, nng.FMatDiag, loss="cross_entropy").diag().tensor[0]
    for name, form in FORMS.items():
        fisher = nng.FIM(model, loader, form)
        damping = RELATIVE_DAMPING * float(fisher.trace()) / fisher.shape[0]
        query = (x[:1], y[:1])
        result = nng.influence(model, loader, [query], fisher, loss="cross_entropy", damping=damping)
        found[f"self-influence, {name}"] = result.self_scores
    return found


def trained(net: tuple[str, int], data: Data, points: tuple[int, ...], seed: int) -> dict[str, Any]:
    """One training of a net by name and width, with the areas at ``points``."""
    y = corrupt(data.y, SHARE, torch.Generator().manual_seed(seed))
    wrong = y != data.y
    model = network(net[0], data.shape, seed, net[1])
    seen: dict[str, Any] = {}

    def visit(step: int) -> None:
        if step not in points:
            return
        found = scores(model, data.x, y)
        order = {name: score.argsort(descending=True) for name, score in found.items()}
        curves = {
            name: (wrong[o].float().cumsum(0) / wrong.sum())[:: max(1, len(y) // 100)] for name, o in order.items()
        }
        with torch.no_grad():
            learned = float((model(data.x).argmax(1) == y)[wrong].float().mean())
        areas = {name: area(score, wrong) for name, score in found.items()}
        seen[str(step)] = {"area": areas, "curves": curves, "memorised": learned}

    descend(model, data.x, y, visit, steps=max(points), lr=0.05, seed=seed)
    return seen


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Areas by method and point, over seeds."""
    rows = []
    for model in dict.fromkeys(name.rpartition("/")[0] for name in cells):
        runs = seeds_of(cells, model)
        for step in runs[0]:
            got = [run[step] for run in runs]
            row = [model, step, spread([g["memorised"] for g in got], ".2g")]
            rows.append([*row, *(spread([g["area"][name] for g in got]) for name in got[0]["area"])])
    return {"mislabelled_images": table(["net", "step", "wrong labels memorised", *runs[0][step]["area"]], rows)}


def draw(runs: list[Any], path: Any) -> None:
    """A panel a point of training: the share of wrong labels found against the share of labels looked at."""
    fig, axes = figure(1, len(runs[0]), 3.8 * len(runs[0]), 3.6, sharey=True)
    for ax, step in zip(axes[0], runs[0]):
        got = [run[step] for run in runs]
        for colour, name in zip(COLOURS, got[0]["curves"]):
            curves = [g["curves"][name] for g in got]
            band(ax, [j / len(curves[0]) for j in range(len(curves[0]))], curves, name, colour)
        ax.plot([0, SHARE, 1], [0, 1, 1], "k:", lw=0.8)
        share = mean([g["memorised"] for g in got])
        ax.set(title=f"step {step}: {100 * share:.0f} % memorised", xlabel="labels looked at", xlim=(0, 0.5))
    axes[0, 0].set(ylabel="wrong labels found")
    axes[0, -1].legend(fontsize=7.5, loc="lower right")
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All runs, one table, one figure."""
    args = options(__doc__, argv, models=("resnet-gn", "vgg", "resnet"), seeds=3, examples=1000, width=16)
    if args.quick:
        args.examples, args.width = 40, 4
    args.model = args.model[:1] if args.quick else args.model
    points = (1, 2) if args.quick else (40, 150, 600)
    data = images(args.data, args.examples, 10)
    cells = Cells(args, "mislabelled_images", examples=args.examples, points=points, width=args.width)
    for model in args.model:
        for seed in range(args.seeds):
            cells.add(f"{model}/{seed}", lambda m=model, s=seed: trained((m, args.width), data, points, s))
    draw(seeds_of(cells.cells, args.model[0]), args.out / "images" / "mislabelled_images.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
