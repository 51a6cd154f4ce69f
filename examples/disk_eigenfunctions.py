"""The tangent kernel of a net that learns a disk: its leading eigenfunctions take on the circle.

    python examples/disk_eigenfunctions.py [--seeds 3]

Points uniform on [-1, 1]^2, label 1 inside the disk that holds half the area; 500 points, 6 hidden layers of 256,
full-batch gradient descent (0.01, momentum 0.9) on binary cross-entropy. The centred kernel on a 20 x 20 grid:
eigenfunctions at the start and the end, and the ratio of eigenvalue 20 to the first along training. Writes
out/disk_eigenfunctions.png.

Protocol: Baratin et al. 2021, fig. 1 (there 50 x 50; the ratio falls from 1.5 % to 0.2 %).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, arguments, figure, mlp, save
from torch.nn import functional as F

from nngeom import analysis

CHECKPOINTS = (0, 30, 100, 300, 1000, 2000)
SIDE = 20


def run(seed: int, checkpoints: tuple[int, ...]) -> list[dict[str, Any]]:
    """Train once; spectrum and eigenfunctions at each checkpoint."""
    torch.manual_seed(seed)
    x = 2 * torch.rand(500, 2) - 1
    y = (x.norm(dim=1) <= math.sqrt(2 / math.pi)).float()
    line = torch.linspace(-1, 1, SIDE)
    grid = torch.cartesian_prod(line, line)
    labels = (grid.norm(dim=1) <= math.sqrt(2 / math.pi)).long()
    model = mlp(2, 256, 6, outputs=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    seen = []
    for step in range(checkpoints[-1] + 1):
        f = model(x)[:, 0]
        if step in checkpoints:
            found = analysis.eigenfunctions(model, [grid], len(grid), centered=True, check=step == 0)
            values = analysis.spectrum(found.eigenvalues)
            # on the sample, K = sum_J lambda_J u_J u_J^T
            u, target = found.functions[:, 0], analysis.label_vector(labels, 1)[0]
            target = target - target.mean()
            cka = (values * (u @ target).square()).sum() / (values.norm() * target.square().sum())
            accuracy = float(((f > 0).float() == y).float().mean())
            ratio, rank = float(values[19] / values[0]), float(analysis.effective_rank(values))
            seen.append({"step": step, "ratio": ratio, "rank": rank, "cka": float(cka), "u": u[:6]})
            print(f"seed {seed} step {step:5d} lambda_20/lambda_1 {100 * ratio:.2f} %", end=" ")
            print(f"effective rank {rank:.1f} CKA {float(cka):.3f} accuracy {accuracy:.3f}", flush=True)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(f, y).backward()
        optimizer.step()
    return seen


def main() -> None:
    """All seeds, one figure."""
    args = arguments(__doc__, seeds=3)
    torch.set_num_threads(1)
    checkpoints = tuple(c for c in CHECKPOINTS if c <= (400 if args.quick else 2000))
    runs = [run(seed, checkpoints) for seed in range(args.seeds)]
    fig, axes = figure(3, 6, 11, 5.6)
    angle = np.linspace(0, 2 * np.pi, 200)
    for row, (name, entry) in enumerate((("start", runs[0][0]), ("end", runs[0][-1]))):
        for j, ax in enumerate(axes[row]):
            u = entry["u"][j].view(SIDE, SIDE).T
            ax.imshow(
                u,
                origin="lower",
                extent=(-1, 1, -1, 1),
                cmap="RdBu_r",
                vmin=-u.abs().max(),
                vmax=u.abs().max(),
                interpolation="bilinear",
            )
            ax.plot(
                math.sqrt(2 / math.pi) * np.cos(angle), math.sqrt(2 / math.pi) * np.sin(angle), color="black", lw=0.7
            )
            ax.set(xticks=[], yticks=[], title=f"{name}: $u_{j + 1}$")
    for ax in axes[2]:
        ax.remove()
    grid = axes[0, 0].get_gridspec()
    panels = {
        "ratio": (r"$\lambda_{20} / \lambda_1$", "log"),
        "rank": ("effective rank", "linear"),
        "cka": ("CKA with the labels", "linear"),
    }
    for j, (key, (title, scale)) in enumerate(panels.items()):
        ax = fig.add_subplot(grid[2, 2 * j : 2 * j + 2])
        for seed, seen in enumerate(runs):
            ax.plot(
                [e["step"] for e in seen],
                [e[key] for e in seen],
                color=COLOURS[seed % len(COLOURS)],
                marker="o",
                ms=3,
                label=f"seed {seed}",
            )
        ax.set(title=title, xlabel="step", yscale=scale, xscale="symlog", xlim=(0, None))
    save(fig, args.out / "disk_eigenfunctions.png")


if __name__ == "__main__":
    main()
