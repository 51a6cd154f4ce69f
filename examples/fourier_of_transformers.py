"""Does a random transformer prefer slow functions too? Fourier modes of its tangent kernel's eigenvectors.

    python examples/fourier_of_transformers.py [--model transformer mlp] [--seeds 5] [--quick]

50 equally spaced points in [0, 1]. The transformer reads a point as 8 tokens, each the point times a vector of the
token's own plus an embedding of the position, passes two pre-norm blocks of width 64 and four heads, and maps the mean
of the tokens to one output; the comparison is the net of six hidden layers of 256. Not trained, float64, kernels
centred: mean frequency of every eigenvector by its index, and the spectrum. The transformer also with positions scaled
by 10, which spreads what its attention sees.

Protocol: Baratin et al. 2021, figure 8, where there are fully connected nets alone.
"""

from __future__ import annotations

from typing import Any

import torch
from fourier_bias import HALF, POINTS, mean_frequency, net
from geometry_common import COLOURS, band, figure
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, options, place, seeds_of, spread
from scipy.stats import spearmanr
from torch import Tensor, nn

from nngeom import analysis

PAGE = "papers.md"
NETS = ("mlp", "transformer", "transformer, scaled")


class Reader(nn.Module):
    """A point of the line as tokens, encoder blocks, the mean of the tokens read out; ``(n, 1) -> (n, 1)``."""

    def __init__(self, scale: float, tokens: int = 8, width: int = 64, blocks: int = 2):
        super().__init__()
        self.scale, self.embed = scale, nn.Linear(1, tokens * width, bias=False)
        self.position = nn.Parameter(torch.randn(tokens, width))
        block = lambda: nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.Sequential(*(block() for _ in range(blocks)))
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        nn.init.normal_(self.embed.weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(self.scale * x).view(len(x), *self.position.shape) + self.position
        return self.read(self.blocks(tokens).mean(1))


def build(kind: str, seed: int) -> nn.Module:
    """A random net of ``NETS``."""
    if kind == "mlp":
        return net(seed)
    torch.manual_seed(seed)
    return Reader(10.0 if kind.endswith("scaled") else 1.0).double().eval()


def look(kind: str, seed: int, points: int) -> dict[str, Any]:
    """Frequencies of the eigenvectors, eigenvalues by the first, the rank correlation of index and frequency."""
    grid = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    found = analysis.eigenfunctions(build(kind, seed), [grid], points, centered=True)
    values = analysis.spectrum(found.eigenvalues)  # 0 at the level of rounding, where eigenvectors mean nothing
    frequency = mean_frequency(found.functions[:, 0]).where(values > 0, torch.nan)
    count = min(HALF, int((values > 0).sum()))
    return {
        "frequency": frequency,
        "values": values / values[0],
        "count": int((values > 0).sum()),
        "correlation": float(spearmanr(range(count), frequency[:count]).statistic),
    }


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Rank correlations, frequencies of some eigenvectors, the decay."""
    rows = []
    for kind in (k for k in NETS if seeds_of(cells, k)):
        runs = seeds_of(cells, kind)
        row = [kind, spread([float(r["count"]) for r in runs], ".2g"), spread([r["correlation"] for r in runs], ".2g")]
        row += [spread([r["frequency"][j] for r in runs], ".2g") for j in (0, 4, 9)]
        rows.append([*row, *(spread([r["values"][j] for r in runs], ".2g") for j in (1, 4, 9))])
    head = [
        "net",
        "eigenvalues above rounding",
        "rank correlation of the first 25 of them",
        *(f"frequency of {j}" for j in ("1st", "5th", "10th")),
    ]
    return {"fourier_of_transformers": table([*head, *(f"eigenvalue {j} / 1st" for j in (2, 5, 10))], rows)}


def draw(cells: dict[str, Any], path: Any) -> None:
    """Mean frequency and eigenvalue by index."""
    fig, axes = figure(1, 2, 9, 3.5)
    for colour, kind in zip(COLOURS, NETS):
        runs = seeds_of(cells, kind)
        if not runs:
            continue
        index = range(1, len(runs[0]["frequency"]) + 1)
        shared = min(r["count"] for r in runs)  # above rounding in all
        band(axes[0, 0], index[:shared], [r["frequency"][:shared] for r in runs], kind, colour)
        for j, r in enumerate(runs):
            axes[0, 1].plot(
                index, [v or None for v in r["values"]], color=colour, lw=0.9, label=kind if j == 0 else None
            )
    axes[0, 0].set(title="mean frequency of the eigenvector", xlabel="index")
    axes[0, 1].set(title=r"$\lambda_j / \lambda_1$", xlabel="index", yscale="log", ylim=(1e-14, 2))
    axes[0, 0].legend(fontsize=8)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All nets, one table, one figure."""
    args = options(__doc__, argv, models=NETS)
    points = 12 if args.quick else POINTS
    cells = Cells(args, "fourier_of_transformers", points=points)
    for kind in args.model:
        for seed in range(args.seeds):
            cells.add(f"{kind}/{seed}", lambda k=kind, s=seed: look(k, s, points))
    draw(cells.cells, args.out / "images" / "fourier_of_transformers.png")
    place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
