"""A random net prefers slow functions: Fourier modes of the kernel's eigenvectors, and what a gradient step changes.

    python examples/fourier_bias.py [--seeds 5] [--quick]

50 equally spaced points in [0, 1], 6 hidden layers of 256, not trained, float64. (a) Magnitude of the Fourier transform
of every eigenvector, its mean frequency by index, and the spectrum, of the centred and of the uncentred kernel; for
comparison He's initialisation with zero biases, whose kinks all lie at 0: on (0, 1] that net is linear. (b) One
gradient step on random targets, which have a part in every mode: its change of each mode, as predicted to first order,
``-lr lambda_J u_J^T dL/df``, and as found.

Protocol: Baratin et al. 2021, fig. 8 (there the frequency rises with the index, and eigenvalue 10 is 0.4 % of the
first) and prop. 6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, band, figure, mlp
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from scipy.stats import spearmanr
from torch import Tensor, nn

from nngeom import analysis

PAGE = "analysis.md"
POINTS, HALF, SHOWN = 50, 25, (0, 5, 20)
RATES = (1e-1, 1e-3)
GRID = torch.linspace(0, 1, POINTS, dtype=torch.float64)[:, None]
KERNELS = {"centred": (False, True), "uncentred": (False, False), "He, no bias, centred": (True, True)}


def net(seed: int, he: bool = False) -> nn.Sequential:
    """The random net, PyTorch's initialisation or He's with zero biases."""
    torch.manual_seed(seed)
    model = mlp(1, 256, 6, outputs=1).double()
    for layer in model if he else ():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model


def fourier(vectors: Tensor) -> Tensor:
    """``(k, points) -> (k, frequencies)``: magnitudes of the Fourier transform, each row of norm one."""
    magnitude = torch.fft.rfft(vectors).abs()
    return magnitude / magnitude.norm(dim=1, keepdim=True)


def mean_frequency(vectors: Tensor) -> Tensor:
    """``(k,)``: the mean frequency, weighted by power."""
    power = fourier(vectors).square()
    return power @ torch.arange(power.shape[1]).to(power)


def modes(kernel: str, seed: int) -> dict[str, Any]:
    """Mean frequencies and eigenvalues of one kernel; of the first seed the eigenvectors too."""
    he, centered = KERNELS[kernel]
    found = analysis.eigenfunctions(net(seed, he), [GRID], POINTS, centered=centered, check=seed == 0)
    u, values = found.functions[:, 0], analysis.spectrum(found.eigenvalues)
    return {"frequency": mean_frequency(u), "eigenvalue": values / values[0], "vectors": [] if seed else u}


def step(rate: float) -> dict[str, Any]:
    """The change of every mode by one step of the first seed's net, predicted and found."""
    targets = torch.randn(POINTS, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = analysis.step_modes(net(0), [(GRID, targets)], rate, "mse")
    error = ((found.actual - found.predicted) / found.predicted).abs()
    return {"predicted": found.predicted, "actual": found.actual, "error": error, "missed": float(found.residual)}


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """A kernel a row; a step a row."""
    rows, steps = [], []
    for kernel in KERNELS:
        runs = seeds_of(cells, kernel)
        ranks = [float(spearmanr(range(HALF), r["frequency"][:HALF]).statistic) for r in runs]
        row = [kernel, spread(ranks, ".2g"), spread([100 * r["eigenvalue"][9] for r in runs], ".2g")]
        rows.append([*row, spread([float(sum(v > 0 for v in r["eigenvalue"])) for r in runs])])
    for rate in RATES:
        found = cells[f"step {rate:g}"]
        wrong = [j for j, e in enumerate(found["error"]) if e > 0.1]
        steps.append([f"{rate:g}", f"{100 * found['missed']:.1g}", str(min(wrong, default=POINTS))])
    head = ["kernel", f"rank correlation, first {HALF}", "eigenvalue 10 in % of the first", "positive eigenvalues"]
    missed = ["step size", "of the change missed, in %", "leading modes right to 10 %"]
    return {"fourier_bias": table(head, rows), "fourier_bias_steps": table(missed, steps)}


def draw(cells: dict[str, Any], path: Path) -> None:
    """Eigenvectors and their frequencies above; eigenvalues and one step below."""
    fig, axes = figure(2, 3, 11, 6)
    index = range(1, POINTS + 1)
    for colour, kernel in zip(COLOURS, KERNELS):
        runs = seeds_of(cells, kernel)
        band(axes[0, 2], index, [r["frequency"] for r in runs], kernel, colour)
        values = np.array([r["eigenvalue"] for r in runs]).T
        axes[1, 0].plot(index, values, color=colour, lw=0.9, label=[kernel] + ["_"] * (len(runs) - 1))
    u = torch.tensor(seeds_of(cells, "centred")[0]["vectors"])
    shape = {"origin": "lower", "aspect": "auto", "extent": (0.5, POINTS + 0.5, -0.5, POINTS // 2 + 0.5)}
    fig.colorbar(axes[0, 0].imshow(fourier(u).T, cmap="viridis", **shape), ax=axes[0, 0])
    for j, colour in zip(SHOWN, COLOURS):
        axes[0, 1].plot(GRID[:, 0], u[j], color=colour, lw=1.3, label=f"$u_{{{j + 1}}}$")
    for colour, rate in zip(COLOURS, RATES):
        found = cells[f"step {rate:g}"]
        predicted, actual = ([abs(v) / rate for v in found[name]] for name in ("predicted", "actual"))
        grey = {"color": "#999999", "lw": 3, "alpha": 0.5}
        axes[1, 1].plot(index, predicted, label="predicted" if rate == RATES[0] else None, **grey)
        axes[1, 1].plot(index, actual, "o", ms=3, color=colour, label=f"found, step {rate:g}")
        axes[1, 2].plot(index, found["error"], color=colour, marker="o", ms=3, lw=1, label=f"step {rate:g}")
    titles = ("Fourier transform of the eigenvectors, centred", "eigenvectors, centred", "mean frequency")
    for ax, title, label in zip(axes[0], titles, ("index", "x", "index")):
        ax.set(title=title, xlabel=label)
    titles = (r"$\lambda_j / \lambda_1$", r"|change of mode| / step size", "relative error of the prediction")
    for ax, title in zip(axes[1], titles):
        ax.set(title=title, xlabel="index", yscale="log")
    axes[0, 0].set(ylabel="frequency")
    axes[1, 0].set(ylim=(1e-14, 2))
    for ax in axes.flat[1:]:
        ax.legend(fontsize=7.5)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All seeds, two tables, one figure."""
    args = options(__doc__, argv, seeds=5)
    cells = Cells(args, "fourier_bias")
    for kernel in KERNELS:
        for seed in range(args.seeds):
            cells.add(f"{kernel}/{seed}", lambda k=kernel, s=seed: modes(k, s))
    for rate in RATES:
        cells.add(f"step {rate:g}", lambda r=rate: step(r))
    draw(cells.cells, args.out / "images" / "fourier_bias.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
