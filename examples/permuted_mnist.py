"""Permuted MNIST: one net learns the digits in one order of the pixels after the other, and is not to forget.

    python examples/permuted_mnist.py [--data FOLDER] [--seeds 3] [--quick]

Five tasks, each 2000 MNIST digits of 14 x 14 in an order of the pixels of its own; a ReLU net of two hidden layers of
200; Adam 0.001, 10 epochs a task of batches of 100. Nothing, a pull to the last parameters, and elastic weight
consolidation: for every task before a quadratic penalty around the parameters at its end, ``strength / 2 (w - w_t)^T
F_t (w - w_t)``, with the diagonal, KFAC or EKFAC of the exact Fisher matrix on 500 of its digits. Accuracy on the tests
of the tasks so far, after each task, at all strengths that were tried.

Protocol: Kirkpatrick et al. 2017, figure 2 (there 60 000 digits and the diagonal); Ritter et al. 2018 for KFAC.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from geometry_common import COLOURS, Data, accuracy, band, batches, figure, mlp
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread
from papers_nets import images
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

PAGE = "papers.md"
FORMS: dict[str, Any] = {
    "nothing": None,
    "distance": nng.PMatEye,
    "Diag": nng.PMatDiag,
    "KFAC": nng.PMatKFAC,
    "EKFAC": nng.PMatEKFAC,
}
STRENGTHS = dict.fromkeys(FORMS, (10.0, 100.0, 1000.0)) | {"nothing": (0.0,), "distance": (0.01, 0.1, 1.0)}


def permuted(data: Data, task: int) -> Data:
    """The pixels in the order of a task; the first keeps theirs."""
    pixels = data.x[0].numel()
    order = torch.randperm(pixels, generator=torch.Generator().manual_seed(task)) if task else torch.arange(pixels)
    return Data(data.x.flatten(1)[:, order], data.y, data.x_test.flatten(1)[:, order], data.y_test)


def remembered(model: nn.Module, form: Any, data: Data, count: int) -> tuple[Any, nng.PVector]:
    """The matrix of a task that has been learned, and the parameters at its end."""
    return nng.FIM(model, [(data.x[:count], data.y[:count])], form), nng.PVector.from_model(model)


def penalty(model: nn.Module, past: list[tuple[Any, nng.PVector]]) -> Tensor:
    """Half the sum of the quadratic forms of all tasks before."""
    now = nng.PVector.from_model(model, live=True)
    return 0.5 * sum(matrix.vTMv(now - anchor) for matrix, anchor in past)


def run(data: Data, method: str, strength: float, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """After each task the accuracies on all tests so far."""
    torch.manual_seed(seed)
    model, order = mlp(data.x[0].numel(), args.width, 2), torch.Generator().manual_seed(seed)
    past: list[tuple[Any, nng.PVector]] = []
    tasks, seen = [permuted(data, task) for task in range(args.tasks)], []
    for task in tasks:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(args.epochs):
            for x, y in batches(task.x, task.y, 100, order):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                (loss + strength * penalty(model, past) if past else loss).backward()
                optimizer.step()
        if FORMS[method] is not None:
            past = [*(past if method != "distance" else []), remembered(model, FORMS[method], task, args.fisher)]
        seen.append([accuracy(model, t.x_test, t.y_test) for t in tasks[: len(seen) + 1]])
    return {"accuracy": seen}


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A strength a row: after the last task."""
    rows = []
    for method in FORMS:
        for strength in STRENGTHS[method]:
            runs = [r["accuracy"] for r in seeds_of(cells, f"{method}/{strength}")]
            row = [method, f"{strength:g}" if strength else "-", spread([100 * mean(r[-1]) for r in runs])]
            row += [spread([100 * r[-1][0] for r in runs]), spread([100 * r[-1][-1] for r in runs])]
            rows.append([*row, spread([100 * mean([r[j][j] - r[-1][j] for j in range(len(r) - 1)]) for r in runs])])
    head = ["penalty", "strength", "all tasks", "the first", "the last", "forgotten, mean over tasks before the last"]
    return {"permuted_mnist": table(head, rows)}


def best(cells: dict[str, Any], method: str) -> float:
    """The strength with the highest accuracy over all tasks at the end."""
    score = lambda s: mean([mean(r["accuracy"][-1]) for r in seeds_of(cells, f"{method}/{s}")])
    return max(STRENGTHS[method], key=score)


def draw(cells: dict[str, Any], path: Path) -> None:
    """Of each method at its best strength: the mean over tasks so far, and the first task."""
    fig, axes = figure(1, 2, 9, 3.5)
    for colour, method in zip(COLOURS, FORMS):
        runs = [r["accuracy"] for r in seeds_of(cells, f"{method}/{best(cells, method)}")]
        x = range(1, len(runs[0]) + 1)
        strength = f", {best(cells, method):g}" if FORMS[method] else ""
        band(axes[0, 0], x, [[mean(seen) for seen in r] for r in runs], f"{method}{strength}", colour, marker=".")
        band(axes[0, 1], x, [[seen[0] for seen in r] for r in runs], "", colour, marker=".")
    for ax, title in zip(axes[0], ("accuracy over the tasks so far", "accuracy on the first task")):
        ax.set(title=title, xlabel="tasks learned", xticks=list(x))
    axes[0, 0].legend(fontsize=8)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All strengths, one table, one figure."""
    args = options(__doc__, argv, seeds=3, tasks=5, epochs=10, images=2000, width=200, fisher=500)
    if args.quick:
        args.tasks, args.epochs, args.images, args.width, args.fisher = 2, 1, 200, 20, 50
    found = images(args.data, args.images, 50 if args.quick else 1000)
    small = lambda x: F.avg_pool2d(x, 2) if found.shape[1] > 20 else x
    data = Data(small(found.x), found.y, small(found.x_test), found.y_test)
    names = ("tasks", "epochs", "images", "width", "fisher")
    cells = Cells(args, "permuted_mnist", **{name: getattr(args, name) for name in names})
    for seed in range(args.seeds):
        for method in FORMS:
            for strength in STRENGTHS[method]:
                compute = lambda m=method, s=strength, k=seed: run(data, m, s, args, k)
                cells.add(f"{method}/{strength}/{seed}", compute)
    draw(cells.cells, args.out / "images" / "permuted_mnist.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
