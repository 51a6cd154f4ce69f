"""Kernels of model gradients under dropout: of the whole net, and of the thinned ones that dropout trains.

    python examples/mgs_dropout.py [--data FOLDER] [--seeds 3] [--quick]

A fully connected net on 500 motion-blurred MNIST digits, 30 % of the labels flipped, 30 epochs, with dropout 0, 0.2,
0.5 and 0.8 after every hidden layer. The kernel on 32 training images, 320 rows: in evaluation mode, and with a mask of
hidden units for each image, drawn once. The paper finds gaps in the log-determinant under dropout: the kernel is
singular there. Singular here is: a rank, to rounding in float64, below the number of rows.

Protocol: Szolnoky et al. 2022, section 4, figure 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from geometry_common import COLOURS, Data, accuracy, band, corrupt, figure, motion_blur
from lazy_common import save
from mgs_common import Recipe, build, train
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from papers_nets import images
from torch import Tensor, nn

from nngeom import mgs

PAGE = "mgs.md"
SHARES = (0.0, 0.2, 0.5, 0.8)
VIEWS = ("whole", "thinned")


def thinned(model: nn.Sequential, batch: dict[str, Tensor]) -> Tensor:
    """The outputs with the masks of the batch, one a dropout layer, each ``(n, width)``, in place of random ones."""
    h, masks = batch["x"], iter([batch[key] for key in sorted(batch) if key.startswith("mask")])
    for layer in model:
        h = h * next(masks) if isinstance(layer, nn.Dropout) else layer(h)
    return h


def masked(model: nn.Sequential, x: Tensor, seed: int) -> dict[str, Tensor]:
    """The images and one draw of masks, scaled as dropout does."""
    generator, batch = torch.Generator().manual_seed(seed), {"x": x}
    for j, layer in enumerate(layer for layer in model if isinstance(layer, nn.Dropout)):
        kept = torch.rand(len(x), model[1].out_features, generator=generator) >= layer.p
        batch[f"mask{j}"] = kept.to(x) / (1 - layer.p)
    return batch


def kernel_of(model: nn.Sequential, batch: dict[str, Tensor], *, whole: bool) -> dict[str, float]:
    """Metrics of the kernel, of the whole net or with the masks."""
    function = (lambda b: model(b["x"])) if whole else lambda b: thinned(model, b)
    found = mgs.metrics(model, [batch], function=function)
    rank, size = int(found.rank[0]), int(found.size[0])
    names = {"trace": "mean_trace", "log": "mean_log", "effective rank": "effective_rank", "cosine": "cosine"}
    values = {name: float(getattr(found, key)[0]) for name, key in names.items()}
    return {**values, "missing rank": size - rank}


def run(data: Data, share: float, epochs: int, seed: int) -> dict[str, Any]:
    """Accuracy and both kernels along one training."""
    torch.manual_seed(seed)
    model, y = build("FCN", data.shape, share), corrupt(data.y, 0.3, torch.Generator().manual_seed(seed))
    batch = masked(model, data.x[:32], seed)
    found: dict[str, Any] = {"epoch": [], "accuracy": [], **{view: [] for view in VIEWS}}

    def visit(epoch: int) -> None:
        found["epoch"].append(epoch)
        found["accuracy"].append(accuracy(model, data.x_test, data.y_test))
        model.eval()
        for view in VIEWS:
            found[view].append(kernel_of(model, batch, whole=view == "whole"))

    train(model, data.x, y, Recipe("dropout", share, epochs=epochs), visit, seed=seed, points=10)
    return found


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A share and a view a row."""
    rows = []
    for share in SHARES:
        runs = seeds_of(cells, f"{share}")
        for view in VIEWS if share else VIEWS[:1]:
            ends = [r[view][-1] for r in runs]
            row = [f"{share:g}", view, spread([100 * r["accuracy"][-1] for r in runs])]
            row += [spread([e[key] for e in ends]) for key in ("trace", "log", "effective rank", "cosine")]
            singular = sum(m["missing rank"] > 0 for r in runs for m in r[view])
            rows.append([*row, f"{singular} of {sum(len(r[view]) for r in runs)}"])
    head = ["dropout", "kernel of the net", "test accuracy", "mean eigenvalue", "mean log eigenvalue"]
    return {"mgs_dropout": table([*head, "effective rank", "cosine", "singular kernels along training"], rows)}


def draw(cells: dict[str, Any], path: Path) -> None:
    """Metrics along training; dotted: thinned."""
    fig, axes = figure(2, 2, 8.5, 6.6)
    axes = axes.reshape(1, 4)
    keys = {"trace": "mean eigenvalue", "log": "mean log eigenvalue", "effective rank": "effective rank"}
    for colour, share in zip(COLOURS, SHARES):
        runs = seeds_of(cells, f"{share}")
        band(axes[0, 0], runs[0]["epoch"], [r["accuracy"] for r in runs], f"dropout {share:g}", colour)
        for ax, key in zip(axes[0, 1:], keys):
            for view, style in zip(VIEWS if share else VIEWS[:1], ("-", ":")):
                values = [[m[key] for m in r[view]] for r in runs]
                band(ax, runs[0]["epoch"], values, f"dropout {share:g}, {view}", colour, ls=style)
    axes[0, 0].set(title="test accuracy", xlabel="epoch")
    for ax, (key, title) in zip(axes[0, 1:], keys.items()):
        ax.set(title=title, xlabel="epoch", **({"yscale": "log", "ylim": (0.5, None)} if key == "trace" else {}))
    fig.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All shares, one table, one figure."""
    args = options(__doc__, argv, epochs=30, images=500)
    if args.quick:
        args.epochs, args.images = 1, 40
    found = images(args.data, args.images, 500)
    data = Data(motion_blur(found.x, 7 if found.shape[1] > 20 else 3), found.y, found.x_test, found.y_test)
    cells = Cells(args, "mgs_dropout", epochs=args.epochs, images=args.images)
    for seed in range(args.seeds):
        for share in SHARES:
            cells.add(f"{share}/{seed}", lambda p=share, k=seed: run(data, p, args.epochs, k))
    draw(cells.cells, args.out / "images" / "mgs_dropout.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
