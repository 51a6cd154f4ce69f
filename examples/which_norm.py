"""The norm that measures capacity: least-norm solutions of anisotropic features, and two bounds on their complexity.

    python examples/which_norm.py [--seeds 100] [--quick]

1000 random features of a Gaussian kernel (gamma = 1) on 1000 points of [-5, 5], with singular value decomposition
``Phi = sum_j sqrt(l_j) psi_j phi_j^T``. The squared singular values are moved from whitened (c = 0) to their own (c =
1), ``1 + c (l_j - 1)``; labels are the sign of the first ``psi`` of which either sign holds a fifth of the points. For
subsamples of 50 points: the least-norm interpolator, its error on the other points, the bound of the plain norm and
that of the best rescaling of singular values. Eigenvalues below 1e-10 of the largest count as zero. ``--seeds``: the
subsamples.

Protocol: Baratin et al. 2021, appendix B.5, fig. 9.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, band, figure
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, spread
from sklearn.kernel_approximation import RBFSampler
from torch import Tensor

from nngeom import analysis

PAGE = "analysis.md"
N, SAMPLE, SIDE = 1000, 50, 5.0
SCALES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)
SHOWN = (0.0, 0.99, 1.0)
FLOOR = 1e-10
NUMBERS = ("error", "plain", "best")


def features() -> tuple[Tensor, Tensor, Tensor]:
    """``psi (N, N)`` in columns, ``l (N,)`` descending, and labels of -1 and 1."""
    x = np.linspace(-SIDE, SIDE, N)[:, None]
    phi = torch.tensor(RBFSampler(gamma=1.0, n_components=N, random_state=0).fit_transform(x))
    psi, roots, _ = torch.linalg.svd(phi)
    share = (psi > 0).double().mean(0)
    first = int(((share > 0.2) & (share < 0.8)).nonzero()[0])
    return psi, roots.square(), psi[:, first].sign()


def subsample(psi: Tensor, l: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, float, float, float]:
    """The least-norm solution ``(N,)`` in the basis ``phi``, its error rate elsewhere, and both bounds."""
    rows = psi[index] * l.sqrt()
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    values = torch.where(values > FLOOR * values[-1], values, torch.zeros_like(values))
    K = (vectors * values) @ vectors.T
    weights = rows.T @ (vectors @ torch.where(values > 0, vectors.T @ y[index] / values, torch.zeros_like(values)))
    out = torch.ones(N, dtype=torch.bool)
    out[index] = False
    predicted = (psi[out] * l.sqrt()) @ weights
    wrong = torch.where(
        predicted.abs() < 1e-9, torch.full_like(predicted, 0.5), (predicted.sign() != y[out]).double()
    )  # no answer: half wrong
    return (
        weights,
        float(wrong.mean()),
        float(analysis.interpolation_bound(K, y[index])),
        float(analysis.rescaled_bound(K, y[index])),
    )


def scale(c: float, seeds: int) -> dict[str, Any]:
    """Errors and bounds of all subsamples at one scale, and where their solutions lie along two of the ``phi``."""
    psi, l, y = features()
    samples = [torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:SAMPLE] for seed in range(seeds)]
    weights, *numbers = zip(*(subsample(psi, 1 + c * (l - 1), y, index) for index in samples))
    points = torch.stack(weights)[:, [0, 9]]
    points = points - points.mean(0)
    deviation = points.abs().median(0).values
    return {**dict(zip(NUMBERS, numbers)), "deviation": deviation, "points": points if c in SHOWN else []}


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A scale a column."""
    shown = {"error": "error on the other points", "plain": "`interpolation_bound`", "best": "`rescaled_bound`"}
    rows = [[name, *(spread(found[key], ".2g") for found in cells.values())] for key, name in shown.items()]
    for j, index in enumerate((1, 10)):
        deviations = (f"{found['deviation'][j]:.2g}" for found in cells.values())
        rows.append([f"median deviation along $\\varphi_{{{index}}}$", *deviations])
    return {"which_norm": table(["c", *cells], rows)}


def draw(cells: dict[str, Any], path: Path) -> None:
    """Solutions at three scales; error and bounds against the scale."""
    fig, axes = figure(2, 2, 8.5, 6)
    axes = axes.reshape(1, 4)
    for order, (colour, c) in enumerate(zip(COLOURS, SHOWN)):
        points = np.array(cells[f"{c:g}"]["points"]).T
        axes[0, 0].scatter(*points, s=7, color=colour, label=f"c = {c:g}", zorder=3 - order / len(SHOWN))
    labels = {"xlabel": r"along $\varphi_1$", "ylabel": r"along $\varphi_{10}$"}
    axes[0, 0].set(title="least-norm solutions, centred", xlim=(-600, 600), ylim=(-600, 600), **labels)
    axes[0, 0].set_xscale("symlog", linthresh=1)
    axes[0, 0].set_yscale("symlog", linthresh=1)
    axes[0, 0].set(xticks=(-100, -1, 0, 1, 100), yticks=(-100, -10, -1, 0, 1, 10, 100))
    axes[0, 0].legend(fontsize=7.5)
    titles = ("error on other points", "bound of the plain norm", "bound of the best rescaling")
    for ax, colour, title, key in zip(axes[0, 1:], COLOURS, titles, NUMBERS):
        band(ax, range(len(cells)), list(zip(*(found[key] for found in cells.values()))), title, colour)
        ax.set(title=title, xlabel="c", xticks=range(len(cells)), xticklabels=list(cells), ylim=(0, None))
        ax.tick_params(axis="x", rotation=60)
    axes[0, 2].set(yscale="log", ylim=(0.3, 2e3))
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All scales, one table, one figure."""
    args = options(__doc__, argv, seeds=100)
    cells = Cells(args, "which_norm", seeds=args.seeds)
    for c in SCALES:
        cells.add(f"{c:g}", lambda c=c: scale(c, args.seeds))
    draw(cells.cells, args.out / "images" / "which_norm.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
