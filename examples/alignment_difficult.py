"""Easy examples before difficult ones: the alignment of the tangent kernel with the labels of each, by depth.

    python examples/alignment_difficult.py [--data FOLDER] [--seeds 3] [--quick]

4000 MNIST digits, to which 400 difficult examples are added, of two kinds: digits with random labels, and characters
that are none, made of digits by a fixed permutation of their 16 blocks of 7 x 7 pixels, with the labels of the digits.
Nets of 2, 4 and 6 hidden layers of 80, SGD 0.02 with momentum 0.9, batches of 100. CKA with the labels, of 100 easy and
of 100 difficult training examples.

Protocol: Baratin et al. 2021, figures 4 and 13 (there 10 000 and 1000 examples, KMNIST as the structured kind, widths
of 80 and 60).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, Data, band, figure, mlp
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from papers_nets import descend, images
from torch import Tensor
from torch.nn import functional as F

import nngeom as nng
from nngeom import analysis

PAGE = "papers.md"
DEPTHS = (2, 4, 6)
KINDS = ("random labels", "other characters")


def characters(x: Tensor) -> Tensor:
    """Images whose 4 x 4 blocks are permuted, the same way in all."""
    side = x.shape[-1] // 4
    blocks = F.unfold(x, side, stride=side)  # [n, pixels of a block, 16]
    order = torch.randperm(blocks.shape[-1], generator=torch.Generator().manual_seed(0))
    return F.fold(blocks[..., order], x.shape[-2:], side, stride=side)


def mixed(data: Data, kind: str, difficult: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels; the first ``difficult`` are of that kind."""
    x, y = data.x.clone(), data.y.clone()
    if kind == "random labels":
        y[:difficult] = torch.randint(0, 10, (difficult,), generator=torch.Generator().manual_seed(seed))
    else:
        x[:difficult] = characters(x[:difficult])
    return x, y


def trained(data: Data, kind: str, depth: int, points: tuple[int, ...], sizes: tuple[int, int], seed: int) -> Any:
    """CKA and accuracy of both groups along one training; ``sizes``: difficult examples, of each group in the probe."""
    difficult, probe = sizes
    x, y = mixed(data, kind, difficult, seed)
    parts = {"difficult": slice(0, probe), "easy": slice(difficult, difficult + probe)}
    torch.manual_seed(seed)
    model = mlp(x[0].numel(), 80, depth)
    seen: dict[str, Any] = {"step": [], **{f"{n} {what}": [] for n in parts for what in ("cka", "accuracy")}}

    def visit(step: int) -> None:
        if step not in points:
            return
        seen["step"].append(step)
        for name, part in parts.items():
            kernel = nng.GramMatrix(model, [x[part]], check=step == 0)
            seen[f"{name} cka"].append(float(analysis.kernel_label_alignment(kernel, y[part])))
            whole = slice(0, difficult) if name == "difficult" else slice(difficult, None)
            right = model(x[whole]).argmax(1) == y[whole]
            seen[f"{name} accuracy"].append(float(right.float().mean()))

    descend(model, x, y, visit, steps=max(points), lr=0.02, seed=seed)
    return seen


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Highest alignments and ratio, and when, over seeds."""
    rows = []
    for prefix in dict.fromkeys(name.rpartition("/")[0] for name in cells):
        runs = seeds_of(cells, prefix)
        easy, hard = (np.array([run[f"{part} cka"] for run in runs]) for part in ("easy", "difficult"))
        ratio, steps = easy / hard, runs[0]["step"]
        at = [steps[int(j)] for j in ratio.argmax(1)]
        kind, depth = prefix.split("/")
        row = [kind, depth, *(spread(v.max(1), ".2g") for v in (easy, hard, ratio)), spread(map(float, at), ".0f")]
        row += [spread([run["difficult accuracy"][steps.index(s)] for run, s in zip(runs, at)], ".2g")]
        rows.append([*row, spread([run["difficult accuracy"][-1] for run in runs], ".2g")])
    head = [
        "difficult",
        "depth",
        "highest CKA, easy",
        "difficult",
        "highest ratio",
        "at step",
        "difficult learned then",
    ]
    return {"alignment_difficult": table([*head, "at the end"], rows)}


def draw(cells: dict[str, Any], path: Any) -> None:
    """A column a kind: CKA of both groups by depth, their ratio."""
    fig, axes = figure(len(DEPTHS) + 1, len(KINDS), 8.5, 9.6)
    for column, kind in zip(axes.T, KINDS):
        for colour, ax, depth in zip(COLOURS, column, DEPTHS):
            runs = seeds_of(cells, f"{kind}/{depth}")
            steps = [max(step, 0.7) for step in runs[0]["step"]]
            easy, hard = (np.array([run[f"{part} cka"] for run in runs]) for part in ("easy", "difficult"))
            band(ax, steps, easy, "easy", COLOURS[2])
            band(ax, steps, hard, "difficult", COLOURS[3])
            band(column[-1], steps, easy / hard, f"depth {depth}", colour)
            ax.set(title=f"{kind}, depth {depth}", ylim=(0, None))
        column[-1].set(title=f"{kind}: easy / difficult")
        for ax in column:
            ax.set(xscale="log", xlabel="step")
            ax.legend(fontsize=8)
    for ax in axes[:-1, 0]:
        ax.set(ylabel="CKA with the labels")
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All runs, one table, one figure."""
    args = options(__doc__, argv, steps=1500, examples=4000)
    sizes = (40, 10) if args.quick else (args.examples // 10, 100)
    if args.quick:
        args.steps, args.examples = 3, 100
    points = tuple(p for p in (0, 3, 10, 20, 40, 70, 110, 160, 240, 400, 700, 1000, 1500, 3000) if p <= args.steps)
    data = images(args.data, args.examples + sizes[0], 100)
    cells = Cells(args, "alignment_difficult", points=points, sizes=(args.examples, *sizes))
    for kind in KINDS:
        for depth in DEPTHS:
            for seed in range(args.seeds):
                run = lambda k=kind, d=depth, s=seed: trained(data, k, d, points, sizes, s)
                cells.add(f"{kind}/{depth}/{seed}", run)
    draw(cells.cells, args.out / "images" / "alignment_difficult.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
