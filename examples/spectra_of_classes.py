"""As many outliers as classes: the leading eigenvalues of Hessian, Gauss-Newton matrix and covariance along training.

    python examples/spectra_of_classes.py [--data FOLDER] [--seeds 3] [--quick]

Nets of two hidden layers of 100 (89 610 parameters with ten outputs) learn MNIST digits of 2, 4 or all 10 classes; the
20 largest eigenvalues of the Hessian by Lanczos, of the Gauss-Newton matrix and of the covariance of gradients at
their last step, the share of the gradient in the leading eigenvectors of the Hessian. The number of outliers is where
the largest ratio between neighbours lies; it means something where that ratio is large.

Protocol: Sagun et al. 2016, 2018; Papyan 2018; Gur-Ari et al. 2018.
"""

from __future__ import annotations

from typing import Any

import torch
from geometry_common import COLOURS, Data, band, figure, mlp
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread
from papers_nets import descend, images
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng

PAGE = "papers.md"
CLASSES = (2, 4, 10)
LEADING = 20


def leading(matrix: Any, seed: int) -> tuple[Tensor, nng.PVector]:
    """The largest eigenvalues and their vectors."""
    generator = torch.Generator().manual_seed(seed)
    return matrix.lanczos(LEADING, tol=1e-3, max_steps=120, strict=False, generator=generator)


def outliers(spectra: list[list[float]]) -> str:
    """How many eigenvalues stand before the largest ratio of neighbours, and that ratio, a seed after the other."""
    found = []
    for values in spectra:
        v = torch.tensor(values).clamp_min(1e-12)
        ratio, at = (v[:-1] / v[1:]).max(0)
        found.append(f"{int(at) + 1} ({ratio:.1f})")
    return ", ".join(found)


def look(model: nn.Module, x: Tensor, y: Tensor, classes: int, seed: int) -> dict[str, Any]:
    """The Hessian's leading eigenvalues, and how much of the gradient lies along the first of their vectors."""
    values, vectors = leading(nng.Hessian(model, (x, y), loss="cross_entropy"), seed)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    gradient = nng.PVector.from_grad(model).flat()
    model.zero_grad()
    inside = (vectors.flat()[:classes] @ gradient).square().sum() / gradient.square().sum()
    return {"hessian": values, "gradient": float(inside), "loss": float(loss.detach())}


def trained(data: Data, classes: int, points: tuple[int, ...], probe: int, seed: int) -> dict[str, Any]:
    """One training on the digits below ``classes``, looked at ``points``."""
    some = data.y < classes
    x, y = data.x[some], data.y[some]
    torch.manual_seed(seed)
    model = mlp(x[0].numel(), 100, 2, outputs=classes)
    seen: dict[str, Any] = {}

    def visit(step: int) -> None:
        if step in points:
            seen[str(step)] = look(model, x[:probe], y[:probe], classes, seed)

    descend(model, x, y, visit, steps=max(points), lr=0.02, seed=seed)
    batch = (x[:probe], y[:probe])
    ggn = nng.GGN(model, batch, nng.PMatImplicit, loss="cross_entropy")
    covariance = nng.GradientCovariance(model, batch, nng.PMatLowRank, loss="cross_entropy")
    seen["at the end"] = {
        "Gauss-Newton": leading(ggn, seed)[0],
        "covariance": covariance.eigh()[0].flip(0)[:LEADING],
    }
    return seen


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Outliers of the three matrices at the end, and along training."""
    rows = []
    for classes in CLASSES:
        runs = seeds_of(cells, f"{classes}")
        steps = [step for step in runs[0] if step.isdigit()]
        row = [str(classes), *(outliers([run[step]["hessian"] for run in runs]) for step in steps)]
        row += [outliers([run["at the end"][name] for run in runs]) for name in ("Gauss-Newton", "covariance")]
        shares = [spread([run[step]["gradient"] for run in runs], ".2g") for step in (steps[0], steps[-2], steps[-1])]
        rows.append([*row, *shares])
    head = ["classes", *(f"outliers at {step}" for step in steps), "Gauss-Newton, end", "covariance, end"]
    head += [f"gradient in as many vectors as classes, {step}" for step in (steps[0], steps[-2], steps[-1])]
    return {"spectra_of_classes": table(head, rows)}


def draw(cells: dict[str, Any], path: Any) -> None:
    """A column a number of classes: eigenvalues by index, along training above, three matrices at the end below."""
    fig, axes = figure(2, len(CLASSES), 11, 6, sharex=True)
    index = range(1, LEADING + 1)
    for (above, below), classes in zip(axes.T, CLASSES):
        runs = seeds_of(cells, f"{classes}")
        steps = [step for step in runs[0] if step.isdigit()]
        for colour, step in zip(COLOURS, steps):
            band(above, index, [run[step]["hessian"] for run in runs], f"step {step}", colour, marker=".")
        last = [run[steps[-1]]["hessian"] for run in runs]
        for colour, (name, values) in zip(COLOURS, {"Hessian": last, **ends(runs)}.items()):
            scale = mean([v[0] for v in values])
            band(below, index, [[x / scale for x in v] for v in values], name, colour, marker=".")
        for ax in (above, below):
            ax.axvline(classes + 0.5, color="#999999", lw=0.8, ls=":")
            ax.set(yscale="log")
        positive = [x for run in runs for step in steps for x in run[step]["hessian"] if x > 0]
        above.set(title=f"{classes} classes: Hessian", ylim=(max(min(positive), 1e-4), None))
        below.set(title="at the end, by the first eigenvalue", xlabel="index", ylim=(1e-3, 1.5))
    axes[0, 0].set(ylabel="eigenvalue")
    axes[0, -1].legend(fontsize=7.5)
    axes[1, -1].legend(fontsize=7.5)
    save(fig, path)


def ends(runs: list[Any]) -> dict[str, list[list[float]]]:
    """The spectra of the other matrices, over seeds."""
    return {name: [run["at the end"][name] for run in runs] for name in ("Gauss-Newton", "covariance")}


def main(argv: list[str] | None = None) -> None:
    """All runs, one table, one figure."""
    args = options(__doc__, argv, seeds=3, examples=2000, probe=500)
    if args.quick:
        args.examples, args.probe = 200, 30
    points = (0, 1) if args.quick else (0, 20, 100, 400)
    data = images(args.data, args.examples, 10)
    cells = Cells(args, "spectra_of_classes", examples=args.examples, probe=args.probe, points=points)
    for seed in range(args.seeds):
        for classes in CLASSES:
            cells.add(f"{classes}/{seed}", lambda c=classes, s=seed: trained(data, c, points, args.probe, s))
    draw(cells.cells, args.out / "images" / "spectra_of_classes.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
