"""Lazy and hasty fine-tuning of a net with batch normalisation in evaluation mode, on digits with spurious backgrounds.

    python examples/lazy_background.py [--data FOLDER] [--seeds 3] [--quick]

MNIST digits of 14 x 14 on patches of two photographs (scikit-learn's, a flower and a temple). A residual net of 8 to 32
channels learns the ten digits on patches of either, 2000 images, 300 steps with batch normalisation in training mode.
Its last layer is replaced by a fresh one for "5 or more", and it is fine-tuned on 1000 other digits, batch
normalisation in evaluation mode, where 95 % of the low digits lie on the flower and 95 % of the high ones on the
temple: SGD with momentum 0.9, batches of 100, learning rate 0.01 / alpha^2, float64. Accuracy with and without the
spurious background, on training images and on a balanced test, at equal training loss.

Protocol: George 2023, thesis, section 5.3.3, Waterbirds (there birds on places, a ResNet-18 from ImageNet).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from geometry_common import Data, band, figure
from lazy_common import COLOURS, save
from lazy_minibatches import ALPHAS, at, descend, right, together
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread
from papers_nets import descend as pretrain
from papers_nets import images, network
from torch import Tensor, nn
from torch.nn import functional as F

from nngeom.linearized import groups_by_attribute

PAGE = "linearized.md"
LEVELS = (0.6, 0.5, 0.4, 0.3, 0.2)
GROUPS = ("with", "without")


def photographs() -> list[Tensor]:
    """The flower and the temple, ``(3, height, width)`` in [0, 0.6], that white digits show, at a quarter of their
    size.
    """
    from sklearn.datasets import load_sample_images

    found = [torch.tensor(image).permute(2, 0, 1).float() / 255 * 0.6 for image in load_sample_images().images]
    return [F.avg_pool2d(image, 4) for image in found[::-1]]


def on_patches(digits: Tensor, which: Tensor, generator: torch.Generator) -> Tensor:
    """Digits ``(n, 1, side, side)`` in white on patches of the photograph ``which (n,)`` at random places."""
    photos, side = photographs(), digits.shape[-1]
    places = torch.rand(len(digits), 2, generator=generator)
    out = []
    for digit, kind, place_ in zip(digits, which.tolist(), places):
        photo = photos[kind]
        top, left = (int(p * (size - side)) for p, size in zip(place_, photo.shape[1:]))
        out.append(digit + (1 - digit) * photo[:, top : top + side, left : left + side])
    return torch.stack(out)


def agreeing(y: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Backgrounds that agree with the labels ``y`` for a share, at random."""
    other = torch.rand(len(y), generator=generator) >= share
    return torch.where(other, 1 - y, y)


def pretrained(data: Data, steps: int, seed: int) -> nn.Sequential:
    """The net that knows the digits on patches of either photograph."""
    generator = torch.Generator().manual_seed(seed)
    x = on_patches(data.x, torch.randint(0, 2, (len(data.x),), generator=generator), generator)
    model = network("resnet", (3, *data.shape[1:]), seed, 8)
    pretrain(model, x, data.y, lambda step: None, steps=steps, lr=0.05, seed=seed)
    return model.eval()


def run(model: nn.Sequential, data: Data, alpha: float, steps: int, seed: int) -> dict[str, list[float]]:
    """The curves of one fine-tuning."""
    generator = torch.Generator().manual_seed(100 + seed)
    y, y_test = ((v >= 5).long() for v in (data.y, data.y_test))
    places, places_test = agreeing(y, 0.95, generator), agreeing(y_test, 0.5, generator)
    x = on_patches(data.x, places, generator).double()
    x_test = on_patches(data.x_test, places_test, generator).double()
    groups, groups_test = groups_by_attribute(y, places), groups_by_attribute(y_test, places_test)
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    model[-1] = nn.Linear(model[-1].in_features, 2)

    def measure(scaled: nn.Module, outputs: Tensor) -> dict[str, Any]:
        test = right(scaled(x_test), y_test)
        train = {f"train {name}": value for name, value in groups.means(right(outputs, y)).items()}
        return {**train, **{f"test {k}": v for k, v in groups_test.means(test).items()}, "test": test.mean()}

    return descend(model.double(), alpha, x, y, measure, lr=0.01, steps=steps, until=0.03, seed=seed)


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Accuracy of all groups at equal training loss."""
    rows = []
    for j, level in enumerate(LEVELS):
        for alpha in ALPHAS:
            runs = seeds_of(cells, f"{alpha:g}")
            found = [at(r, "loss", LEVELS) for r in runs]
            keys = [f"{part} {name}" for part in ("train", "test") for name in GROUPS]
            row = [spread([None if f[key][j].isnan() else float(f[key][j]) for f in found]) for key in keys]
            rows.append([f"{level:g}", f"{alpha:g}", *row])
    groups = [f"{part}, {name} the background" for part in ("training", "test") for name in GROUPS]
    ends = []
    for alpha in ALPHAS:
        runs = seeds_of(cells, f"{alpha:g}")
        row = [f"{alpha:g}", f"{mean([r['step'][-1] for r in runs]):.0f}", spread([r["loss"][-1] for r in runs])]
        row += [spread([max(r["test"]) for r in runs])]
        ends.append([*row, *(spread([r[key][-1] for r in runs]) for key in ("kernel", "signs"))])
    last = ["alpha", "steps", "training loss", "highest accuracy, balanced test", "kernel alignment", "signs kept"]
    return {
        "lazy_background": table(["training loss", "alpha", *groups], rows),
        "lazy_background_ends": table(last, ends),
    }


def draw(cells: dict[str, Any], path: Path, shown: Tensor) -> None:
    """Examples; at equal training loss the balanced test, and between groups the gaps of training and of test."""
    fig, axes = figure(2, 2, 8.5, 6.6)
    axes = axes.reshape(1, 4)
    pictures = shown[:16].unflatten(0, (4, 4)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    axes[0, 0].imshow(pictures)
    axes[0, 0].set(title="training images", xticks=[], yticks=[])
    for alpha in ALPHAS:
        levels, curves = together(seeds_of(cells, f"{alpha:g}"), "loss")
        band(axes[0, 1], levels, curves["test"], f"alpha {alpha:g}", COLOURS[alpha])
        for ax, part in zip(axes[0, 2:], ("train", "test")):
            band(ax, levels, curves[f"{part} with"] - curves[f"{part} without"], "", COLOURS[alpha])
    axes[0, 1].set(title="balanced test accuracy")
    axes[0, 2].set(ylabel="usual less unusual background")
    axes[0, 1].legend(fontsize=8)
    for ax, part in zip(axes[0, 2:], ("training", "test")):
        ax.set(title=f"gap in {part} accuracy")
        ax.axhline(0, color="#999999", lw=0.8, ls="--")
    for ax in axes[0, 1:]:
        ax.set(xlabel="training loss", xscale="log")
        ax.invert_xaxis()
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """Pretraining and all runs, two tables, one figure."""
    args = options(__doc__, argv, seeds=3, pretraining=300, steps=600, images=1000)
    if args.quick:
        args.pretraining, args.steps, args.images = 3, 4, 120
    found = images(args.data, 3 * args.images, 60 if args.quick else 600)
    small = lambda x: F.avg_pool2d(x, 2) if found.shape[1] > 20 else x
    x, n = small(found.x)[:, :1], 2 * args.images
    first = Data(x[:n], found.y[:n], x[:1], found.y[:1])
    then = Data(x[n:], found.y[n:], small(found.x_test)[:, :1], found.y_test)
    cells = Cells(args, "lazy_background", pretraining=args.pretraining, steps=args.steps, images=args.images)
    for seed in range(args.seeds):
        if any(f"{alpha:g}/{seed}" not in cells.cells for alpha in ALPHAS):
            model = pretrained(first, args.pretraining, seed)
            for alpha in ALPHAS:
                compute = lambda a=alpha, m=model, s=seed: run(m, then, a, args.steps, s)
                cells.add(f"{alpha:g}/{seed}", compute)
    generator = torch.Generator().manual_seed(0)
    kinds = agreeing((then.y[:16] >= 5).long(), 0.95, generator)
    draw(cells.cells, args.out / "images" / "lazy_background.png", on_patches(then.x[:16], kinds, generator))
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
