"""A random net prefers slow functions: Fourier modes of the tangent kernel's eigenvectors, and what one gradient step
changes.

    python examples/fourier_bias.py [--seeds 5]

50 equally spaced points in [0, 1], 6 hidden layers of 256, not trained, float64. (a) Magnitude of the Fourier transform
of every eigenvector, its mean frequency by index, and the spectrum, of the centred and of the uncentred kernel; for
comparison He's initialisation with zero biases, whose kinks all lie at 0: on (0, 1] that net is linear. (b) One
gradient step on random targets, which have a part in every mode: its change of each mode, as predicted to first order,
``-lr lambda_J u_J^T dL/df``, and as found. Writes out/fourier_bias.png.

Protocol: Baratin et al. 2021, fig. 8 (there the frequency rises with the index, and eigenvalue 10 is 0.4 % of the
first) and prop. 6.
"""

from __future__ import annotations

import torch
from geometry_common import COLOURS, arguments, band, figure, mlp, save
from scipy.stats import spearmanr
from torch import Tensor, nn

from nngeom import analysis

POINTS, HALF, SHOWN = 50, 25, (0, 5, 20)
RATES = (1e-1, 1e-3)


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


def main() -> None:
    """All seeds, one figure."""
    args = arguments(__doc__, seeds=5)
    torch.set_num_threads(1)
    grid = torch.linspace(0, 1, POINTS, dtype=torch.float64)[:, None]
    fig, axes = figure(2, 3, 11, 6)
    for colour, (name, he, centered) in zip(
        COLOURS, (("centred", False, True), ("uncentred", False, False), ("He, no bias, centred", True, True))
    ):
        found = [
            analysis.eigenfunctions(net(seed, he), [grid], POINTS, centered=centered, check=seed == 0)
            for seed in range(args.seeds)
        ]
        frequencies = torch.stack([mean_frequency(e.functions[:, 0]) for e in found])
        values = torch.stack([analysis.spectrum(e.eigenvalues) for e in found])
        ranks = [spearmanr(range(HALF), f[:HALF]).statistic for f in frequencies]
        ratios = values[:, 9] / values[:, 0]
        print(
            f"{name:21s} rank correlation of index and frequency, first {HALF}: {min(ranks):.2f} to {max(ranks):.2f}",
            end="; ",
        )
        print(
            f"lambda_10/lambda_1 {ratios.min():.1e} to {ratios.max():.1e}, positive eigenvalues "
            f"{int((values > 0).sum(1).min())}",
            flush=True,
        )
        band(axes[0, 2], range(1, POINTS + 1), frequencies, name, colour)
        axes[1, 0].plot(
            range(1, POINTS + 1),
            (values / values[:, :1]).T,
            color=colour,
            lw=0.9,
            label=[name] + ["_"] * (args.seeds - 1),
        )
        if centered and not he:
            u = found[0].functions[:, 0]
            image = axes[0, 0].imshow(
                fourier(u).T,
                origin="lower",
                aspect="auto",
                cmap="viridis",
                extent=(0.5, POINTS + 0.5, -0.5, POINTS // 2 + 0.5),
            )
            fig.colorbar(image, ax=axes[0, 0])
            for j, c in zip(SHOWN, COLOURS):
                axes[0, 1].plot(grid[:, 0], u[j], color=c, lw=1.3, label=f"$u_{{{j + 1}}}$")
    model, targets = net(0), torch.randn(POINTS, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for colour, rate in zip(COLOURS, RATES):
        step = analysis.step_modes(model, [(grid, targets)], rate, "mse")
        modes = range(1, POINTS + 1)
        axes[1, 1].plot(
            modes,
            step.predicted.abs() / rate,
            color="#999999",
            lw=3,
            alpha=0.5,
            label="predicted" if rate == RATES[0] else None,
        )
        axes[1, 1].plot(modes, step.actual.abs() / rate, "o", ms=3, color=colour, label=f"found, step {rate:g}")
        error = ((step.actual - step.predicted) / step.predicted).abs()
        axes[1, 2].plot(modes, error, color=colour, marker="o", ms=3, lw=1, label=f"step {rate:g}")
        good = int((error > 0.1).nonzero()[0]) if bool((error > 0.1).any()) else POINTS
        print(
            f"step {rate:g}: {float(step.residual):.1e} of the change missed to first order; modes right to 10 "
            f"%: the first {good}",
            flush=True,
        )
    titles = (
        "Fourier transform of the eigenvectors, centred",
        "eigenvectors, centred",
        "mean frequency of the eigenvectors",
    )
    for ax, title, label in zip(axes[0], titles, ("index", "x", "index")):
        ax.set(title=title, xlabel=label)
    for ax, title in zip(
        axes[1], (r"$\lambda_j / \lambda_1$", r"|change of mode| / step size", "relative error of the prediction")
    ):
        ax.set(title=title, xlabel="index", yscale="log")
    axes[0, 0].set(ylabel="frequency")
    axes[1, 0].set(ylim=(1e-14, 2))
    for ax in axes.flat[1:]:
        ax.legend(fontsize=7.5)
    save(fig, args.out / "fourier_bias.png")


if __name__ == "__main__":
    main()
