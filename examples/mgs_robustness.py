"""Model Gradient Similarity against what is not tuned: batch size, learning rate and length of training.

    python examples/mgs_robustness.py [--data FOLDER] [--seeds 2] [--quick]

A fully connected net on 500 motion-blurred MNIST digits, 60 % of the labels flipped; the methods that keep plain SGD,
at the strengths that ``mgs_bench.py`` tuned at batches of 32, a learning rate of 0.05 and 30 epochs. From there one of
the three is changed at a time, and nothing is tuned again.

Protocol: Szolnoky et al. 2022, appendix D.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from geometry_common import band, figure
from lazy_common import save
from mgs_bench import data_of, final, run
from mgs_common import COLOUR, GRIDS, Recipe, chosen, strength_of
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread, stored

PAGE = "mgs.md"
BASE = {"batch": 32, "lr": 0.05, "epochs": 30}
SWEEPS: dict[str, tuple[float, ...]] = {
    "batch": (16, 32, 128),
    "lr": (0.02, 0.05, 0.1, 0.2),
    "epochs": (10, 30, 60),
}
TITLES = {"batch": "batch size", "lr": "learning rate", "epochs": "epochs"}
METHODS = [method for method in GRIDS if method not in ("cyclical rate", "Adam")]
SETTINGS = [BASE, *({**BASE, key: value} for key in SWEEPS for value in SWEEPS[key] if value != BASE[key])]


def name_of(setting: dict[str, Any], method: str) -> str:
    """Of the results of all seeds."""
    return "/".join([*(f"{value:g}" for value in setting.values()), method])


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A method a row, a change a column; in percent."""
    strengths, rows = chosen(stored("mgs_bench"), "FCN"), []
    for method in METHODS:
        found = [seeds_of(cells, name_of(setting, method)) for setting in SETTINGS]
        finals = [[100 * final(r) for r in runs] for runs in found]
        row = [strength_of(method, strengths[method], GRIDS[method]), *(spread(values) for values in finals)]
        rows.append([*row, f"{min(mean(values) for values in finals if values):.1f}"])
    changed = [f"{TITLES[key]} {s[key]:g}" for s in SETTINGS[1:] for key in SWEEPS if s[key] != BASE[key]]
    return {"mgs_robustness": table(["method, strength", "as tuned", *changed, "lowest"], rows)}


def draw(cells: dict[str, Any], path: Path) -> None:
    """Final accuracy against each of the three."""
    fig, axes = figure(1, len(SWEEPS), 11, 3.6, sharey=True)
    for ax, (key, values) in zip(axes[0], SWEEPS.items()):
        for method in METHODS:
            runs = {v: seeds_of(cells, name_of({**BASE, key: v}, method)) for v in values}
            there = {v: [final(r) for r in found] for v, found in runs.items() if found}
            band(ax, list(there), np.array(list(there.values())).T, method, COLOUR[method], marker=".")
        ax.set(xlabel=TITLES[key], xscale="log")
        ax.set_xticks(values, [f"{v:g}" for v in values])
        ax.minorticks_off()
        ax.axvline(BASE[key], color="#cccccc", lw=0.8, zorder=0)
    axes[0, 0].set(ylabel="final test accuracy")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All settings, one table, one figure."""
    args = options(__doc__, argv, seeds=2, images=500)
    strengths = chosen(stored("mgs_bench"), "FCN")
    kept = {method: strengths[method] for method in METHODS}
    cells = Cells(args, "mgs_robustness", images=60 if args.quick else args.images, strengths=kept)
    for seed, setting in product(range(args.seeds), SETTINGS[:1] if args.quick else SETTINGS):
        data = data_of(args.data, "FCN", cells.settings["images"], seed)
        for method, strength in kept.items():
            recipe = Recipe(method, strength, **{**setting, "epochs": 2} if args.quick else setting)
            compute = lambda r=recipe: run("FCN", data, 0.6, r, seed)  # noqa: B023 (called at once)
            cells.add(f"{name_of(setting, method)}/{seed}", compute)
    draw(cells.cells, args.out / "images" / "mgs_robustness.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
