"""The entries of a matrix as an image, its layers or outputs marked at the sides."""

from __future__ import annotations

from typing import Any

from nngeom.core.errors import ArgumentError
from nngeom.fmat.operator import FunctionOperator
from nngeom.plot.canvas import canvas
from nngeom.plot.readings import Side, pooled, require_matrix, sides_of

LIMIT, PIXELS, MOST_NAMES = 4000, 800, 24
SCALES = ("log", "linear")
_SHARES = (0.01, 0.1, 1)  # of the largest entry, at the colour bar


def matrix(M: Any, *, scale: str = "log", limit: int = LIMIT, ax: Any = None) -> Any:
    """The entries of a matrix or kernel as an image, red positive and blue negative; returns matplotlib's axes.

    Args:
        M: a matrix, with its layers marked, or a kernel, with its outputs marked (rows are ordered by output, then
            example).
        scale: ``"log"``, over three decades below the largest absolute entry, or ``"linear"``.
        limit: the most rows that are made dense.
        ax: matplotlib's axes to draw on; new ones by default.

    Where there are more than 800 rows, a pixel is the entry of largest absolute value of its tile. Raises
    :class:`SizeError` above ``limit`` rows (of a matrix draw ``M[layer]``), :class:`ArgumentError` on another
    ``scale``, :class:`MissingExtraError` without matplotlib.
    """
    require_matrix(M)
    if scale not in SCALES:
        raise ArgumentError(f"scale is {scale!r}; expected one of {list(SCALES)}")
    entries = pooled(M.to_dense(limit).detach().double().cpu(), PIXELS)
    ax = canvas(ax, size=(6.0, 5.2))
    from matplotlib.colors import Normalize, SymLogNorm

    largest = float(entries.abs().max()) or 1.0
    norm = SymLogNorm(1e-3 * largest, vmin=-largest, vmax=largest) if scale == "log" else Normalize(-largest, largest)
    height, width = M.shape
    image = ax.imshow(entries.numpy(), cmap="RdBu_r", norm=norm, extent=(0, width, height, 0), interpolation="nearest")
    ticks = [sign * share * largest for sign in (-1, 1) for share in (_SHARES if scale == "log" else (0.5, 1))] + [0]
    ax.figure.colorbar(image, ax=ax, shrink=0.85, ticks=ticks, format="{x:.2g}")
    ax.grid(visible=False)
    sides = sides_of(M)
    _mark(ax.yaxis, sides, ax.axhline)
    _mark(ax.xaxis, sides if not isinstance(M, FunctionOperator) else sides_of(M.T), ax.axvline)
    ax.tick_params(axis="x", rotation=90)
    ax.set_title(type(M).__name__)
    return ax


def _mark(axis: Any, sides: list[Side], line: Any) -> None:
    """Lines between the runs, and their names in the middle; of very many the longest alone are named."""
    named = sorted(sides, key=lambda side: side.start - side.stop)[:MOST_NAMES]
    axis.set_ticks([(side.start + side.stop) / 2 for side in named], [side.name for side in named])
    axis.set_tick_params(length=0)
    for side in sides[1:] if len(sides) <= 4 * MOST_NAMES else []:
        line(side.start, color="#555555", lw=0.5)
