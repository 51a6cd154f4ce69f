"""The tangent kernel of a net that learns a disk: its leading eigenfunctions take on the circle.

    python examples/disk_eigenfunctions.py [--seeds 3] [--side 50] [--quick]

Points uniform on [-1, 1]^2, label 1 inside the disk that holds half the area; 500 points, 6 hidden layers of 256,
full-batch gradient descent (0.01, momentum 0.9) on binary cross-entropy. The centred kernel on a 50 x 50 grid:
eigenfunctions at the start and the end, and along training the ratio of eigenvalue 20 to the first, the effective rank,
the alignment with the labels.

Protocol: Baratin et al. 2021, figure 1 (the ratio falls from 1.5 % to 0.2 %).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from geometry_common import COLOURS, band, figure, mlp
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from torch.nn import functional as F

from nngeom import analysis

PAGE = "papers.md"
CHECKPOINTS = (0, 30, 100, 300, 1000, 2000)
RADIUS = math.sqrt(2 / math.pi)


def run(seed: int, checkpoints: tuple[int, ...], side: int) -> dict[str, Any]:
    """Train once; spectrum at each checkpoint, and of the first seed the first and last eigenfunctions."""
    torch.manual_seed(seed)
    x = 2 * torch.rand(500, 2) - 1
    y = (x.norm(dim=1) <= RADIUS).float()
    line = torch.linspace(-1, 1, side)
    grid = torch.cartesian_prod(line, line)
    labels = (grid.norm(dim=1) <= RADIUS).long()
    model = mlp(2, 256, 6, outputs=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    seen: dict[str, Any] = {}
    for step in range(checkpoints[-1] + 1):
        f = model(x)[:, 0]
        if step in checkpoints:
            found = analysis.eigenfunctions(model, [grid], len(grid), centered=True, check=step == 0)
            values = analysis.spectrum(found.eigenvalues)
            # on the sample, K = sum_J lambda_J u_J u_J^T
            u, target = found.functions[:, 0], analysis.label_vector(labels, 1)[0]
            target = target - target.mean()
            cka = (values * (u @ target).square()).sum() / (values.norm() * target.square().sum())
            seen[str(step)] = {
                "ratio": float(values[19] / values[0]),
                "rank": float(analysis.effective_rank(values)),
                "cka": float(cka),
                "accuracy": float(((f > 0).float() == y).float().mean()),
            }
            if seed == 0 and step in (0, checkpoints[-1]):
                top = (u[:6] / u[:6].abs().amax(1, keepdim=True)).view(6, side, side)
                seen[str(step)]["functions"] = [[[round(v, 2) for v in row] for row in f] for f in top.tolist()]
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(f, y).backward()
        optimizer.step()
    return seen


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Every checkpoint, over seeds."""
    runs, rows = seeds_of(cells, "disk"), []
    for step in runs[0]:
        got = [run[step] for run in runs]
        row = [spread([100 * g["ratio"] for g in got], ".2g"), *(spread([g[k] for g in got]) for k in ("rank", "cka"))]
        rows.append([step, *row, spread([g["accuracy"] for g in got])])
    head = ["step", "eigenvalue 20 in % of the first", "effective rank", "CKA with the labels", "training accuracy"]
    return {"disk_eigenfunctions": table(head, rows)}


def draw(runs: list[dict[str, Any]], path: Any) -> None:
    """Eigenfunctions of the first seed, before and after; three numbers along training."""
    steps = list(runs[0])
    fig, axes = figure(3, 6, 11, 5.6)
    angle = np.linspace(0, 2 * np.pi, 200)
    for row, (name, step) in enumerate((("start", steps[0]), ("end", steps[-1]))):
        for j, ax in enumerate(axes[row]):
            u = np.array(runs[0][step]["functions"][j]).T
            ax.imshow(u, origin="lower", extent=(-1, 1, -1, 1), cmap="RdBu_r", vmin=-1, vmax=1)
            ax.plot(RADIUS * np.cos(angle), RADIUS * np.sin(angle), color="black", lw=0.7)
            ax.set(xticks=[], yticks=[], title=f"{name}: $u_{j + 1}$")
    for ax in axes[2]:
        ax.remove()
    grid = axes[0, 0].get_gridspec()
    panels = {"ratio": (r"$\lambda_{20} / \lambda_1$", "log"), "rank": ("effective rank", "linear")}
    for j, (key, (title, scale)) in enumerate({**panels, "cka": ("CKA with the labels", "linear")}.items()):
        ax = fig.add_subplot(grid[2, 2 * j : 2 * j + 2])
        x = [max(int(step), 1) for step in steps]
        band(ax, x, [[run[step][key] for step in steps] for run in runs], "", COLOURS[j], marker="o", ms=3)
        ax.set(title=title, xlabel="step (1: before training)", yscale=scale, xscale="log")
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All seeds, one table, one figure."""
    args = options(__doc__, argv, seeds=3, side=50)
    if args.quick:
        args.side = 10
    checkpoints = (0, 3) if args.quick else CHECKPOINTS
    cells = Cells(args, "disk_eigenfunctions", side=args.side, checkpoints=checkpoints)
    for seed in range(args.seeds):
        cells.add(f"disk/{seed}", lambda s=seed: run(s, checkpoints, args.side))
    draw(seeds_of(cells.cells, "disk"), args.out / "images" / "disk_eigenfunctions.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
