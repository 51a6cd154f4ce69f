"""Axes to draw on: matplotlib asked for when it is needed, one style, no global state."""

from __future__ import annotations

from typing import Any

from nngeom.core.optional import optional

BLUE, RED, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe & Ito's, for any colour vision
COLOURS = (BLUE, RED, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")


def canvas(ax: Any, panels: int = 1, size: tuple[float, float] = (6.0, 4.0)) -> Any:
    """The axes ``ax``, or new ones: one, or an array of ``panels`` beside each other, in a figure of ``size`` inches.

    New figures belong to pyplot, so that notebooks show them. Raises :class:`MissingExtraError` without matplotlib.
    """
    plt = optional("matplotlib.pyplot")
    if ax is not None:
        return ax
    fig, axes = plt.subplots(1, panels, figsize=size, layout="constrained")
    for each in axes if panels > 1 else [axes]:
        plain(each)
    return axes


def plain(ax: Any) -> None:
    """Two spines, and a light grid behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
