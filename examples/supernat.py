"""SuperNat against gradient descent: learning a rescaling of the features fits the signal and freezes the noise.

    python examples/supernat.py [--seeds 40]

Linear regression from n = 50 points: one signal feature ``phi ~ N(0, 1)``, d = 10 noise features ``N(0, I/d)``, and
labels ``y = phi + Phi_noise Phi_noise^T e`` with ``e ~ N(0, 0.1 I)``; the test error is against the signal alone.
Full-batch steps of 0.5 on the mean loss. Writes out/supernat.png and prints the errors. Protocol: Baratin et al. 2021,
fig. 5.
"""

from __future__ import annotations

import numpy as np
import torch
from geometry_common import COLOURS, arguments, band, figure, save
from torch import Tensor

from nngeom.analysis import SuperNat

STEPS, D, N = 300, 10, 50
METHODS = {"gradient descent": None, "SuperNat, kappa = max": "max", "SuperNat, kappa = trace": "trace"}


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels to train on, features and signal to test on."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    signal, noise = draw(N), draw(N, D) / D**0.5
    y = signal + noise @ (noise.T @ (0.1**0.5 * draw(N)))
    test, other = draw(1000), draw(1000, D) / D**0.5
    return torch.cat([signal[:, None], noise], 1), y, torch.cat([test[:, None], other], 1), test


def main() -> None:
    """All seeds, one figure."""
    args = arguments(__doc__, seeds=40)
    errors = {name: np.zeros((args.seeds, STEPS)) for name in METHODS}
    values = {}
    for seed in range(args.seeds):
        x, y, xt, yt = problem(seed)
        for name, kappa in METHODS.items():
            model, track = SuperNat(x, y, 0.5, kappa), []
            first = model.singular_values.square().max()
            for step in range(STEPS):
                model.step()
                errors[name][seed, step] = float((xt @ model.weights - yt).square().mean())
                track.append(model.singular_values.square() / first)
            if seed == 0:
                values[name] = torch.stack(track)
    fig, axes = figure(1, 3, 11, 3.2)
    for colour, (name, e) in zip(COLOURS, errors.items()):
        band(axes[0, 0], range(1, STEPS + 1), e, name, colour)
        print(
            f"{name:26s} test error at step {STEPS}: {e[:, -1].mean():.3f} +- "
            f"{e[:, -1].std() / args.seeds**0.5:.3f}, lowest {e.mean(0).min():.3f}"
        )
    axes[0, 0].set(title="test error against the signal", xlabel="step", yscale="log", xscale="log")
    axes[0, 0].legend(fontsize=7.5)
    for ax, name in zip(axes[0, 1:], ("gradient descent", "SuperNat, kappa = max")):
        ax.plot(range(1, STEPS + 1), values[name].clamp_min(1e-12), color="#999999", lw=1)
        ax.plot(range(1, STEPS + 1), values[name][:, 0], color=COLOURS[1], lw=2, label="signal")
        ax.set(title=f"squared singular values\n{name}", xlabel="step", xscale="log", yscale="log", ylim=(1e-8, 2))
    save(fig, args.out / "supernat.png")


if __name__ == "__main__":
    main()
