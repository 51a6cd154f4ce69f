"""Which directions of the parameters move a trained net: singular vectors of the Jacobian against random ones.

    python examples/alignment_directions.py [--data FOLDER] [--model vgg] [--seeds 3] [--quick]

A VGG-like net on MNIST, before and after training. The right singular vectors of its Jacobian on 100 test images come
from the tangent kernel, ``v_j = J^T u_j / sigma_j``; the parameters move by 0.1 along the first 50 of them, and along
50 random directions, and the root mean square change of a logit is taken on these images and on 400 others.

Protocol: Baratin et al. 2021, figure 7 (there VGG-11 on CIFAR-10, ten epochs).
"""

from __future__ import annotations

from typing import Any

import torch
from geometry_common import COLOURS, Data, band, figure
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from papers_nets import descend, images, network, settle
from torch import Tensor, nn

import nngeom as nng

PAGE = "papers.md"
LENGTH = 0.1


def directions(model: nn.Module, x: Tensor, count: int, seed: int) -> tuple[nng.PVector, Tensor]:
    """``count`` leading right singular vectors of the Jacobian on ``x``, as many random ones, and singular values."""
    jacobian = nng.Jacobian(model, [x], nng.PushForwardImplicit, check=False)
    values, vectors = nng.GramMatrix(model, [x]).eigh()
    sigma = values[-count:].flip(0).clamp_min(0).sqrt()
    left = vectors[:, -count:].flip(1).T.reshape(count, -1, len(x)) / sigma[:, None, None]
    singular = jacobian.T.mv(nng.FVector(left))
    random = nng.PVector.randn(jacobian.layer_collection, count, generator=torch.Generator().manual_seed(seed))
    random = random / random.norm()
    both = torch.cat([singular.flat(), random.flat()])
    return nng.PVector.from_flat(jacobian.layer_collection, both), sigma


@torch.no_grad()
def changes(model: nn.Module, moves: nng.PVector, x: Tensor) -> list[float]:
    """The root mean square change of a logit on ``x`` when the parameters move along each."""
    before, found = model(x), []
    for move in moves:
        move.add_to(model, LENGTH)
        found.append(float((model(x) - before).square().mean().sqrt()))
        move.add_to(model, -LENGTH)
    return found


def look(model: nn.Module, data: Data, probe: int, count: int, seed: int) -> dict[str, Any]:
    """Changes on the images of the Jacobian and on others, and what the singular values predict for the first."""
    moves, sigma = directions(model, data.x_test[:probe], count, seed)
    return {
        "here": changes(model, moves, data.x_test[:probe]),
        "elsewhere": changes(model, moves, data.x_test[probe:]),
        "predicted": LENGTH * sigma / (10 * probe) ** 0.5,
    }


def trained(net: tuple[str, int], data: Data, steps: int, probe: int, count: int, seed: int) -> dict[str, Any]:
    """Both ends of one training of a net by name and width."""
    model = network(net[0], data.shape, seed, net[1])
    settle(model, data.x[:500])
    seen: dict[str, Any] = {}

    def visit(step: int) -> None:
        if step in (0, steps):
            seen["start" if step == 0 else "end"] = look(model, data, probe, count, seed)

    descend(model, data.x, data.y, visit, steps=steps, lr=0.01, seed=seed)
    return seen


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Changes along some directions, over seeds."""
    rows = []
    for model in dict.fromkeys(name.rpartition("/")[0] for name in cells):
        for when in ("start", "end"):
            got = [run[when] for run in seeds_of(cells, model)]
            count = len(got[0]["predicted"])
            shown = [j for j in (0, 9, 49) if j < count]
            row = [f"{model}, {when}", *(spread([g["elsewhere"][j] for g in got], ".2g") for j in shown)]
            random = [sum(g["elsewhere"][count:]) / count for g in got]
            ratio = [g["elsewhere"][0] / r for g, r in zip(got, random)]
            rows.append([*row, *[""] * (3 - len(shown)), spread(random, ".2g"), spread(ratio, ".2g")])
    head = ["change of a logit", "1st", "10th", "50th singular vector", "random direction", "1st / random"]
    return {"alignment_directions": table(head, rows)}


def draw(runs: list[Any], path: Any) -> None:
    """Before and after training: the change by direction."""
    fig, axes = figure(1, 2, 9, 3.4, sharey=True)
    for ax, when in zip(axes[0], ("start", "end")):
        got = [run[when] for run in runs]
        count = len(got[0]["predicted"])
        for colour, where, label in zip(COLOURS, ("here", "elsewhere"), ("images of the Jacobian", "other images")):
            band(ax, range(1, 2 * count + 1), [g[where] for g in got], label, colour)
        band(ax, range(1, count + 1), [g["predicted"] for g in got], "first order", COLOURS[6], ls=":")
        ax.axvline(count + 0.5, color="#999999", lw=0.8)
        ax.set(title=f"{when} of training", xlabel=f"direction: {count} singular vectors, {count} random", yscale="log")
    axes[0, 0].set(ylabel=f"change of a logit, step of {LENGTH:g}")
    axes[0, 0].legend(fontsize=8)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All runs, one table, one figure."""
    args = options(__doc__, argv, models=("vgg", "resnet"), steps=200, probe=100, directions=50, width=16)
    if args.quick:
        args.steps, args.probe, args.directions, args.width, args.model = 2, 5, 10, 4, args.model[:1]
    data = images(args.data, 200 if args.quick else 2000, args.probe + (20 if args.quick else 400))
    settings = {name: getattr(args, name) for name in ("steps", "probe", "directions", "width")}
    cells = Cells(args, "alignment_directions", **settings)
    for model in args.model:
        for seed in range(args.seeds):
            run = lambda m=model, s=seed: trained((m, args.width), data, args.steps, args.probe, args.directions, s)
            cells.add(f"{model}/{seed}", run)
    draw(seeds_of(cells.cells, args.model[0]), args.out / "images" / "alignment_directions.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
