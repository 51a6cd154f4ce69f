"""The tangent kernel of two classes along training, as a picture and as a kernel PCA: George 2023, figure 7.

    python examples/thesis_kernels.py [--data FOLDER] [--model resnet] [--seeds 3] [--quick]

A residual net learns all ten digits of MNIST. The tangent kernel of the difference of two logits, ``f_8 - f_3``, on 50
test images of each of these classes, at four points of training: entries divided by the norms of the features, and the
points in the two leading principal directions. A number to each: within-class cosine minus that between classes, and
the share of points on the right side of the best line in the plane.

Protocol: thesis section 3.4.2 (there ResNet-50 on TinyImagenet, two of 200 classes).
"""

from __future__ import annotations

from typing import Any

import torch
from geometry_common import COLOURS, Data, accuracy, figure
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from papers_nets import descend, images, network, settle
from torch import Tensor, nn

import nngeom as nng
from nngeom import analysis

PAGE = "papers.md"
PAIR = (3, 8)


def two_classes(data: Data, each: int) -> tuple[Tensor, Tensor]:
    """Test images of the pair, class by class, and which of the two they are."""
    index = [(data.y_test == c).nonzero().flatten()[:each] for c in PAIR]
    return data.x_test[torch.cat(index)], torch.cat([torch.full((len(i),), j) for j, i in enumerate(index)])


def separated(points: Tensor, y: Tensor) -> float:
    """The largest share of points ``(n, 2)`` that a line puts on the side of their class ``y``."""
    best = 0.0
    for angle in torch.linspace(0, torch.pi, 181)[:-1]:
        order = (points @ torch.stack([angle.cos(), angle.sin()]).to(points)).argsort()
        ones = torch.cat([torch.zeros(1), y[order].float().cumsum(0)])  # of the second class among the first k
        right = (torch.arange(len(y) + 1) - ones + y.sum() - ones) / len(y)
        best = max(best, float(right.max()), float(1 - right.min()))
    return best


def look(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Both pictures and their numbers, at one point of training."""
    difference = torch.zeros(10, 1)
    difference[list(PAIR), 0] = torch.tensor([-1.0, 1.0])
    kernel = nng.GramMatrix(model, [x], function=lambda inputs: model(inputs) @ difference)
    cosines, points = analysis.normalised_gram(kernel), analysis.kernel_pca(kernel, 2)
    same = (y[:, None] == y[None]) & ~torch.eye(len(y), dtype=torch.bool)
    return {
        "contrast": float(cosines[same].mean() - cosines[y[:, None] != y[None]].mean()),
        "separated": separated(points, y),
        "rank": float(analysis.effective_rank(kernel)),
        "cka": float(analysis.kernel_label_alignment(kernel, y)),
        "cosines": [[round(v, 2) for v in row] for row in cosines.tolist()],
        "points": points,
    }


def trained(net: tuple[str, int], data: Data, points: tuple[int, ...], each: int, seed: int) -> dict[str, Any]:
    """One training of a net by name and width, looked at ``points``; the pictures of the first seed alone are kept."""
    model = network(net[0], data.shape, seed, net[1])
    settle(model, data.x[:500])
    x, y = two_classes(data, each)
    seen: dict[str, Any] = {}

    def visit(step: int) -> None:
        if step in points:
            found = look(model, x, y)
            kept = found if seed == 0 else {k: v for k, v in found.items() if k not in ("cosines", "points")}
            seen[str(step)] = {"accuracy": accuracy(model, data.x_test, data.y_test), **kept}

    descend(model, data.x, data.y, visit, steps=max(points), lr=0.05, seed=seed)
    return seen


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """The numbers of every point of training, over seeds."""
    rows = []
    for model in dict.fromkeys(name.rpartition("/")[0] for name in cells):
        runs = seeds_of(cells, model)
        for step in runs[0]:
            got = [run[step] for run in runs]
            keys = ("accuracy", "contrast", "separated", "cka", "rank")
            rows.append([model, step, *(spread([g[key] for g in got]) for key in keys)])
    head = ["net", "step", "accuracy, ten classes", "cosine within - between", "separable in the plane", "CKA"]
    return {"thesis_kernels": table([*head, "effective rank"], rows)}


def draw(run: dict[str, Any], path: Any) -> None:
    """The normalised kernel above, the kernel PCA below."""
    fig, axes = figure(2, len(run), 2.7 * len(run) + 0.6, 5.6)
    for (above, below), (step, seen) in zip(axes.T, run.items()):
        shown = above.imshow(seen["cosines"], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        half = len(seen["points"]) // 2
        above.set(title=f"step {step}, accuracy {seen['accuracy']:.2f}", xticks=[], yticks=[])
        points = torch.tensor(seen["points"])
        for colour, part, name in zip(COLOURS, (points[:half], points[half:]), PAIR):
            below.scatter(part[:, 0], part[:, 1], s=11, color=colour, label=f"digit {name}")
        below.set(title=f"{100 * seen['separated']:.0f} % separable", xlabel="1st direction", xticks=[], yticks=[])
    axes[0, 0].set(ylabel=f"{PAIR[0]} (top), {PAIR[1]} (bottom)")
    axes[1, 0].set(ylabel="2nd direction")
    axes[1, 0].legend(fontsize=8, loc="best")
    fig.colorbar(shown, ax=axes[0], label="cosine of features", shrink=0.9)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All runs, one table, a figure of the first seed of the first net."""
    args = options(__doc__, argv, models=("resnet", "vgg", "resnet-gn"), each=50, width=16)
    if args.quick:
        args.each, args.width, args.model = 10, 4, args.model[:1]
    points = (0, 2) if args.quick else (0, 20, 80, 400)
    data = images(args.data, 200 if args.quick else 4000, 1000)
    cells = Cells(args, "thesis_kernels", each=args.each, points=points, width=args.width)
    for model in args.model:
        for seed in range(args.seeds):
            cells.add(f"{model}/{seed}", lambda m=model, s=seed: trained((m, args.width), data, points, args.each, s))
    draw(seeds_of(cells.cells, args.model[0])[0], args.out / "images" / "thesis_kernels.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
