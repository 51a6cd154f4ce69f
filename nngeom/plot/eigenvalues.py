"""Eigenvalues in descending order, or how they are distributed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nngeom.core.errors import ArgumentError
from nngeom.plot.canvas import COLOURS, canvas
from nngeom.plot.readings import Spectrum, spectrum_of

KINDS = ("values", "density")


def spectrum(M: Any, *, kind: str = "values", top: int | None = None, label: str | None = None, ax: Any = None) -> Any:
    """The eigenvalues of a matrix or kernel on a logarithmic axis; returns matplotlib's axes.

    Args:
        M: a matrix, a kernel, a tensor of eigenvalues ``(r,)``, or a dict of such by name, drawn together.
        kind: ``"values"``, in descending order, the negative ones as hollow marks at their absolute value and in the
            order of it; or ``"density"``, a histogram of absolute values.
        top: show the largest alone; by default all, or 20 of a matrix that is known by its products.
        label: what stands in the legend for a single one.
        ax: matplotlib's axes to draw on; new ones by default.

    Those at rounding level, ``sqrt(d)`` epsilon of the largest, have no place on the axis; the legend counts them.
    Raises :class:`ArgumentError` on another ``kind``, on no or infinite eigenvalues, :class:`MissingExtraError` without
    matplotlib.
    """
    if kind not in KINDS:
        raise ArgumentError(f"kind is {kind!r}; expected one of {list(KINDS)}")
    given = M if isinstance(M, Mapping) else {label or type(M).__name__: M}
    spectra = {name: spectrum_of(x, top) for name, x in given.items()}
    ax = canvas(ax)
    draw = _values if kind == "values" else _density
    for j, (name, read) in enumerate(spectra.items()):
        draw(ax, read, f"{name}{_note(read)}", COLOURS[j % len(COLOURS)])
    ax.legend(frameon=False)
    return ax


def _note(read: Spectrum) -> str:
    parts = [f"{len(read.values)} of {read.size}"] if len(read.values) < read.size else []
    parts += [f"{read.zeros} at rounding"] if read.zeros else []
    negative = int((read.values < 0).sum())
    parts += [f"{negative} negative"] if negative else []
    return f" ({', '.join(parts)})" if parts else ""


def _values(ax: Any, read: Spectrum, label: str, colour: str) -> None:
    for values, marks in ((read.values, {"marker": ".", "label": label}), (-read.values.flip(0), {"marker": "o"})):
        above = values[values > 0]
        hollow = "none" if marks["marker"] == "o" else colour
        ax.plot(torch.arange(1, len(above) + 1), above, color=colour, lw=1, ms=4, mfc=hollow, **marks)
    ax.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue")


def _density(ax: Any, read: Spectrum, label: str, colour: str) -> None:
    values = read.values.abs()[read.values != 0]
    if len(values):
        low, high = float(values.min().log10()) - 0.05, float(values.max().log10()) + 0.05
        edges = 10 ** torch.linspace(low, high, max(2, min(60, 4 + len(values) // 2)))
        ax.hist(values.numpy(), bins=edges.numpy(), color=colour, alpha=0.55, label=label)
    else:
        ax.hist([], color=colour, label=label)
    ax.set(xscale="log", xlabel="absolute eigenvalue", ylabel="count")
