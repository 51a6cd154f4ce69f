"""Numbers of each layer, or of each example, as bars."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nngeom.attribution.influence import Influence
from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.plot.canvas import BLUE, GREEN, PURPLE, RED, canvas
from nngeom.plot.readings import layers_of

PANELS = (("trace", "trace", BLUE), ("top", "largest eigenvalue", PURPLE), ("rank", "effective rank", GREEN))


def layers(M: Any, *, axes: Any = None) -> Any:
    """Trace, largest eigenvalue and effective rank of every layer, in the order of the model; returns three axes.

    ``M``: a matrix over parameters, or ``{layer: matrix or kernel}`` as ``GramMatrices`` gives it; of a matrix that is
    known by its products the effective rank is left out. ``axes``: three of matplotlib's to draw on; new ones by
    default. Raises :class:`ArgumentTypeError` for what has no layers, :class:`MissingExtraError` without matplotlib.
    """
    if axes is not None and len(axes) != len(PANELS):
        raise ArgumentError(f"got {len(axes)} axes; expected {len(PANELS)}")
    readings = layers_of(M)
    axes = canvas(axes, len(PANELS), size=(11.0, max(2.4, 0.9 + 0.28 * len(readings))))
    places = list(range(len(readings)))
    for ax, (field, title, colour) in zip(axes, PANELS):
        values = [getattr(reading, field) for reading in readings.values()]
        ax.barh(places, values, color=colour)
        ax.set_yticks(places, list(readings) if ax is axes[0] else [""] * len(places))
        ax.set_ylim(len(places) - 0.5, -0.5)
        ax.set_title(title, fontsize=10, loc="left")
        if all(x != x for x in values):
            ax.set_xticks([])
            ax.text(0.5, 0.5, "known by products only", ha="center", color="#777777", transform=ax.transAxes)
    return axes


def influence(scores: Influence | Tensor, query: int = 0, *, top: int = 8, names: Any = None, ax: Any = None) -> Any:
    """The training examples with the largest and the smallest scores for a query; returns matplotlib's axes.

    Args:
        scores: what :func:`nngeom.influence` returned, or a tensor of scores ``(q, n)``.
        query: which one, from 0.
        top: how many at each end.
        names: of the training examples, ``(n,)``; their numbers by default.
        ax: matplotlib's axes to draw on; new ones by default.

    A positive score: more weight on the example lowers the loss of the query. Raises :class:`ArgumentError` where there
    is no such query or no example to show, :class:`MissingExtraError` without matplotlib.
    """
    values, indices = extremes(scores, query, top)
    ax = canvas(ax, size=(6.0, 1.0 + 0.26 * len(values)))
    places = list(range(len(values)))
    ax.barh(places, values, color=[BLUE if x > 0 else RED for x in values])
    ax.axvline(0, color="#555555", lw=0.8)
    ax.set_yticks(places, [str(i if names is None else names[i]) for i in indices])
    ax.set_ylim(len(places) - 0.5, -0.5)
    ax.set(xlabel=f"influence on query {query}", ylabel="training example")
    return ax


def extremes(scores: Influence | Tensor, query: int, top: int) -> tuple[list[float], list[int]]:
    """The ``top`` scores at each end for a ``query``, descending, and the examples that have them."""
    rows = scores if isinstance(scores, Tensor) else getattr(scores, "scores", None)
    whole = rows is not None
    rows = getattr(scores, "values", None) if rows is None else rows  # with top= only the largest were kept
    if not isinstance(scores, (Tensor, Influence)) or not isinstance(rows, Tensor) or rows.ndim != 2:
        raise ArgumentTypeError(
            f"the scores are {type(scores).__name__}; expected what influence returned, or a tensor (q, n)"
        )
    if not 0 <= query < len(rows) or top < 1:
        raise ArgumentError(f"query is {query} and top {top}; there are {len(rows)} queries, expected one and top >= 1")
    row = rows[query].detach().double().cpu()
    order = row.argsort(descending=True, stable=True)
    ends = torch.cat([order[:top], order[-top:]]) if len(order) > 2 * top else order
    order = ends if whole else order[:top]
    indices = getattr(scores, "indices", None)
    examples = order if whole or indices is None else indices[query].cpu()[order]
    return row[order].tolist(), examples.tolist()
