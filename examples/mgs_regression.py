"""Model Gradient Similarity in regression: the lower half of a digit from its upper half, with noise on the targets.

    python examples/mgs_regression.py [--data FOLDER] [--seeds 3] [--model FCN LeNet] [--quick]

400 motion-blurred upper halves of 14 x 28 pixels, the 392 pixels below as targets, normal noise of scale 0, 0.4 or 0.8
on them in training; mean squared error; eight methods, each tuned once at a scale of 0.4 on a validation split and
kept. 100 epochs of batches of 64, SGD 2 with momentum 0.9. Errors are on clean targets, divided by that of the mean
image.

Protocol: Szolnoky et al. 2022, section 6.2 (there Facial Keypoints, 15 pairs of coordinates).
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_common import Data, band, figure, motion_blur
from lazy_common import save
from mgs_common import COLOUR, GRIDS, Recipe, build, chosen, measured, strength_of, train, tune
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread
from papers_nets import images
from torch.nn import functional as F

PAGE = "mgs.md"
NETS = ("FCN", "LeNet")
SCALES = (0.0, 0.4, 0.8)
TUNED = 0.4
REGRESSION_GRIDS = {
    **GRIDS,
    "weight decay": (1e-5, 1e-4, 1e-3),
    "cyclical rate": (2.0, 4.0, 8.0),
    "loss gradient, parameters": (1e-4, 5e-4, 2e-3),
    "loss gradient, inputs": (1e-3, 1e-2, 1e-1),
    "MGS": (3e-7, 1e-6, 3e-6, 1e-5),
}


def halves(folder: Path | None, count: int, seed: int, *, validation: bool = False) -> Data:
    """Upper halves and the pixels of the lower ones, to train on and to judge by."""
    found = images(folder, 2 * count if validation else count, 600, seed)
    x, held_out = found.x[:count], found.x[count:] if validation else found.x_test
    middle = found.shape[1] // 2
    upper = lambda v: motion_blur(v, 7 if middle > 10 else 3)[:, :, :middle]
    lower = lambda v: v[:, :, middle:].flatten(1)
    return Data(upper(x), lower(x), upper(held_out), lower(held_out))


def run(net: str, data: Data, scale: float, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Relative errors along one training, and the metrics at its end."""
    torch.manual_seed(seed)
    model = build(net, data.shape, recipe.dropout, data.y.shape[1])
    noise = torch.randn(data.y.shape, generator=torch.Generator().manual_seed(seed))
    unit = float((data.y_test - data.y.mean(0)).square().mean())
    found: dict[str, Any] = {"epoch": [], "error": []}

    def visit(epoch: int) -> None:
        model.eval()
        with torch.no_grad():
            found["error"].append(float((model(data.x_test) - data.y_test).square().mean()) / unit)
        found["epoch"].append(epoch)

    train(model, data.x, data.y + scale * noise, recipe, visit, seed=seed)
    return {**found, "metrics": measured(model, data.x[:2])}


def final(found: dict[str, Any]) -> float:
    """Mean of the last three evaluations."""
    return mean(found["error"][-3:])


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A method a row, a scale a column."""
    rows = []
    for net in NETS:
        for method, strength in chosen(cells, net, REGRESSION_GRIDS).items():
            row = [net, strength_of(method, strength, REGRESSION_GRIDS[method])]
            for scale in SCALES:
                runs = seeds_of(cells, f"{net}/{scale}/{method}")
                lowest = f" ({np.mean([r['error'] for r in runs], 0).min():.2f})" if runs else ""
                row.append(spread([final(r) for r in runs]) + lowest)
            last = [r["metrics"] for r in seeds_of(cells, f"{net}/{TUNED}/{method}")]
            row += [spread([m[key] for m in last]) for key in ("trace", "rank")]
            if row[2:] != ["-"] * len(row[2:]):
                rows.append(row)
    head = ["net", "method, strength", *(f"scale {scale:g}" for scale in SCALES)]
    metrics = [f"{name}, scale {TUNED:g}" for name in ("mean eigenvalue", "effective rank")]
    return {"mgs_regression": table([*head, *metrics], rows)}


def draw(cells: dict[str, Any], path: Path) -> None:
    """Error along training at the scale of tuning, and final errors against the scale, a net a row."""
    nets = [net for net in NETS if any(name.startswith(f"{net}/") for name in cells)]
    fig, axes = figure(len(nets), 2, 8.5, 3 * len(nets) + 0.7)
    for (along, last), net in zip(axes, nets):
        for method, colour in COLOUR.items():
            seen = seeds_of(cells, f"{net}/{TUNED}/{method}")
            if seen:
                band(along, seen[0]["epoch"], [r["error"] for r in seen], method, colour)
            runs = [(scale, seeds_of(cells, f"{net}/{scale}/{method}")) for scale in SCALES]
            runs = [(scale, found) for scale, found in runs if found]
            if len(runs) > 1:
                ends = np.array([[final(r) for r in found] for _, found in runs]).T
                band(last, [scale for scale, _ in runs], ends, "", colour, marker=".")
        along.set(title=f"{net}: error on the test, scale {TUNED:g}", xlabel="epoch", yscale="log")
        last.set(title=f"{net}: final error", xlabel="scale of the noise on targets", yscale="log")
        for ax in (along, last):
            ax.minorticks_off()
            ax.set_yticks([0.6, 0.8, 1, 1.5, 2, 3], ["0.6", "0.8", "1", "1.5", "2", "3"])
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5)
    save(fig, path)


def fill(args: argparse.Namespace, cells: Cells) -> None:
    """Tuning and all scales of all nets, a seed after the other."""
    recipe_of = lambda method, strength: Recipe(method, strength, F.mse_loss, args.epochs, 64, 2.0)
    for net in args.model:
        apart = halves(args.data, args.images, 99, validation=True)
        score = lambda m, s, net=net, apart=apart: -final(run(net, apart, TUNED, recipe_of(m, s), 99))
        tune(cells, net, REGRESSION_GRIDS, score, quick=args.quick)
    for seed, net, scale in product(range(args.seeds), args.model, (TUNED,) if args.quick else SCALES):
        data = halves(args.data, args.images, seed)
        for method, strength in chosen(cells.cells, net, REGRESSION_GRIDS).items():
            compute = lambda r=recipe_of(method, strength): run(net, data, scale, r, seed)  # noqa: B023 (called at once)
            cells.add(f"{net}/{scale}/{method}/{seed}", compute)


def main(argv: list[str] | None = None) -> None:
    """Everything, one table, one figure."""
    args = options(__doc__, argv, NETS, seeds=3, epochs=100, images=400)
    if args.quick:
        args.epochs, args.images = 2, 64
    cells = Cells(args, "mgs_regression", epochs=args.epochs, images=args.images)
    fill(args, cells)
    draw(cells.cells, args.out / "images" / "mgs_regression.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
