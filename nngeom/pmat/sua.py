"""Spatially uncorrelated activations: one input factor for all places of a window (Grosse & Martens 2016, section 4.2).

The input factor over (channel, place) is replaced by ``A (x) I`` with ``A`` the second moment of the channels, averaged
over places: the nearest matrix of this form, with the same trace. The places become groups of the block, ``[(s w), o,
c]``; the bias is a block of its own, of one input and ``o`` outputs. Where the window has one place nothing changes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nngeom.core.factored import FactoredJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout, Piece
from nngeom.core.statistic import Inputs, Moment
from nngeom.core.window import channel_sums, rotate_channels
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock


def has_window(layout: Layout, j: LayerJacobian) -> bool:
    """Whether the inputs are windows of more than one place."""
    return _window(layout) > 1 and type(j) is FactoredJacobian


def _window(layout: Layout) -> int:
    return layout.pieces[0].arrangement.window


def parts(layout: Layout) -> tuple[Layout, Layout | None]:
    """The weight with its places as groups, and the bias."""
    weight = layout.pieces[0]
    bias = Layout(layout.pieces[1:]) if len(layout.pieces) > 1 else None
    return Layout((Piece(weight.names, weight.offset, weight.arrangement.by_place()),)), bias


def sua_sums(layout: Layout, j: Any, sharing: str, limit: int) -> dict[str, Tensor | Moment | Inputs]:
    """The sums that :func:`sua_blocks` takes the means of."""
    return channel_sums(j, _window(layout), len(layout.pieces) > 1, sharing, limit)


def sua_blocks(layout: Layout, means: dict[str, Tensor]) -> dict[Layout, KroneckerBlock]:
    """The weight's block, the same factors in every place, and the bias's."""
    weight, bias = parts(layout)
    block = KroneckerBlock(means["c"], means["g"]).map_tensors(lambda t: t.repeat_interleave(_window(layout), 0))
    return {weight: block} if bias is None else {weight: block, bias: KroneckerBlock(means["b"], means["g"])}


def sua_squares(layout: Layout, j: Any, bases: dict[Layout, EigenBlock]) -> dict[Layout, dict[str, Tensor]]:
    """Squares of the rows in the eigenbases of :func:`sua_blocks`."""
    window = _window(layout)
    weight, bias = parts(layout)
    basis = bases[weight]
    ua, ug = (None if u is None else u[::window] for u in (basis.ua, basis.ug))
    squares = rotate_channels(j, window, bias is not None, ua, ug).square()
    if bias is None:
        return {weight: {"d": _by_place(squares, window)}}
    return {weight: {"d": _by_place(squares[..., :-1], window)}, bias: {"d": squares[..., -1:]}}


def _by_place(d: Tensor, window: int) -> Tensor:
    """``[s, o, (c w)] -> [(s w), o, c]``."""
    return d.unflatten(-1, (-1, window)).movedim(-1, 1).flatten(0, 1)
