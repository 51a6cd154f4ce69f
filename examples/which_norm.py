"""The norm that measures capacity: least-norm solutions of anisotropic features, and two bounds on their complexity.

    python examples/which_norm.py [--seeds 100]

1000 random features of a Gaussian kernel (gamma = 1) on 1000 points of [-5, 5], with singular value decomposition
``Phi = sum_j sqrt(l_j) psi_j phi_j^T``. The squared singular values are moved from whitened (c = 0) to their own (c =
1), ``1 + c (l_j - 1)``; labels are the sign of the first ``psi`` of which either sign holds a fifth of the points. For
subsamples of 50 points: the least-norm interpolator, its error on the other points, the bound of the plain norm and
that of the best rescaling of singular values. Eigenvalues below 1e-10 of the largest count as zero. Writes
out/which_norm.png. ``--seeds``: the subsamples.

Protocol: Baratin et al. 2021, appendix B.5, fig. 9.
"""

from __future__ import annotations

import numpy as np
import torch
from geometry_common import COLOURS, arguments, band, figure, save
from sklearn.kernel_approximation import RBFSampler
from torch import Tensor

from nngeom import analysis

N, SAMPLE, SIDE = 1000, 50, 5.0
SCALES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)
SHOWN = (0.0, 0.99, 1.0)
FLOOR = 1e-10


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


def main() -> None:
    """All scales, one figure."""
    args = arguments(__doc__, seeds=100)
    torch.set_num_threads(1)
    args.seeds = 5 if args.quick else args.seeds
    psi, l, y = features()
    samples = [torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:SAMPLE] for seed in range(args.seeds)]
    fig, axes = figure(1, 4, 12, 3.2)
    table = np.zeros((3, args.seeds, len(SCALES)))
    for i, c in enumerate(SCALES):
        runs = [subsample(psi, 1 + c * (l - 1), y, index) for index in samples]
        table[:, :, i] = np.array([r[1:] for r in runs]).T
        weights = torch.stack([r[0] for r in runs])
        weights = weights - weights.mean(0)
        error, plain, best = table[:, :, i].mean(1)
        spread = weights[:, [0, 9]].abs().median(0).values
        print(f"c {c:5.3f}: error {error:.3f}, bound of the plain norm {plain:.3g}, rescaled {best:.3f}", end="; ")
        print(f"median deviation along phi_1 {spread[0]:.1e}, phi_10 {spread[1]:.1e}", flush=True)
        if c in SHOWN:
            axes[0, 0].scatter(
                weights[:, 0],
                weights[:, 9],
                s=7,
                color=COLOURS[SHOWN.index(c)],
                label=f"c = {c:g}",
                zorder=3 - i / len(SCALES),
            )
    axes[0, 0].set(
        title="least-norm solutions, centred",
        xlabel=r"along $\varphi_1$",
        ylabel=r"along $\varphi_{10}$",
        xlim=(-600, 600),
        ylim=(-600, 600),
    )
    axes[0, 0].set_xscale("symlog", linthresh=1)
    axes[0, 0].set_yscale("symlog", linthresh=1)
    axes[0, 0].set(xticks=(-100, -1, 0, 1, 100), yticks=(-100, -10, -1, 0, 1, 10, 100))
    axes[0, 0].legend(fontsize=7.5)
    titles = ("error on other points", "bound of the plain norm", "bound of the best rescaling")
    for ax, colour, title, runs in zip(axes[0, 1:], COLOURS, titles, table):
        band(ax, range(len(SCALES)), runs, title, colour)
        ax.set(
            title=title, xlabel="c", xticks=range(len(SCALES)), xticklabels=[f"{c:g}" for c in SCALES], ylim=(0, None)
        )
        ax.tick_params(axis="x", rotation=60)
    axes[0, 2].set(yscale="log", ylim=(0.3, 2e3))
    save(fig, args.out / "which_norm.png")


if __name__ == "__main__":
    main()
