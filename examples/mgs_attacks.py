"""Unusual inputs found by the trace of the kernel of each: gradient attacks and plain noise on MNIST.

    python examples/mgs_attacks.py [--data FOLDER] [--seeds 3] [--quick]

A fully connected net on 1000 clean digits, 20 epochs; 500 test images, clean against changed: the area under the curve
of two scores, the trace of the kernel of one input and that of the Fisher matrix.

Protocol: Szolnoky et al. 2022, appendix C; Martin and Elster 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from geometry_common import COLOURS, Data, figure
from lazy_common import save
from mgs_common import Recipe, build, train
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from papers_nets import images
from torch import Tensor, nn

from nngeom import mgs

PAGE = "mgs.md"
SCORES = {"sample_trace": mgs.sample_trace, "sample_fisher_trace": mgs.sample_fisher_trace}
ATTACKS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "FGSM, 0.05": lambda m, x, y: mgs.fgsm(m, x, y, 0.05),
    "FGSM, 0.1": lambda m, x, y: mgs.fgsm(m, x, y, 0.1),
    "PGD, 0.1, 20 steps": lambda m, x, y: mgs.pgd(m, x, y, 0.1, 20),
    "PGD, 0.2, 40 steps": lambda m, x, y: mgs.pgd(m, x, y, 0.2, 40),
    "random signs, 0.2, no attack": lambda m, x, y: (
        x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()
    ),
}


def run(data: Data, epochs: int, seed: int) -> dict[str, Any]:
    """Areas of both scores for every change, and the accuracy on the changed images."""
    torch.manual_seed(seed)
    model = build("FCN", data.shape)
    train(model, data.x, data.y, Recipe("none", 0.0, epochs=epochs), lambda epoch: None, seed=seed)
    clean = {name: score(model, data.x_test) for name, score in SCORES.items()}
    found = {}
    for name, attack in ATTACKS.items():
        moved = attack(model, data.x_test, data.y_test)
        areas = {key: float(mgs.auroc(clean[key], score(model, moved))) for key, score in SCORES.items()}
        with torch.no_grad():
            found[name] = {**areas, "accuracy": float((model(moved).argmax(1) == data.y_test).float().mean())}
    return found


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A change a row."""
    runs = seeds_of(cells, "FCN")
    rows = [[name, *(spread([r[name][key] for r in runs]) for key in ("accuracy", *SCORES))] for name in ATTACKS]
    return {"mgs_attacks": table(["input", "accuracy", *(f"`{name}`" for name in SCORES)], rows)}


def draw(cells: dict[str, Any], path: Path) -> None:
    """Areas of both scores, a dot a seed."""
    fig, axes = figure(1, 1, 7, 3.2)
    for colour, shift, key in zip(COLOURS, (-0.12, 0.12), SCORES):
        points = [(j + shift, r[name][key]) for j, name in enumerate(ATTACKS) for r in seeds_of(cells, "FCN")]
        axes[0, 0].scatter(*zip(*points), color=colour, s=22, label=key)
    axes[0, 0].axhline(0.5, color="#999999", lw=0.8, ls="--")
    axes[0, 0].set_xticks(range(len(ATTACKS)), [name.replace(", ", ",\n", 1) for name in ATTACKS])
    axes[0, 0].set(ylabel="area under the curve", ylim=(0, 1.02))
    axes[0, 0].legend(fontsize=8)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All seeds, one table, one figure."""
    args = options(__doc__, argv, epochs=20, images=1000)
    if args.quick:
        args.epochs, args.images = 1, 60
    data = images(args.data, args.images, 40 if args.quick else 500)
    cells = Cells(args, "mgs_attacks", epochs=args.epochs, images=args.images)
    for seed in range(args.seeds):
        cells.add(f"FCN/{seed}", lambda k=seed: run(data, args.epochs, k))
    draw(cells.cells, args.out / "images" / "mgs_attacks.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
