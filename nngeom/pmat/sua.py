"""Spatially uncorrelated activations: one input factor for all places of a window (Grosse & Martens 2016, section 4.2).

The input factor over (channel, place) is replaced by ``A (x) I`` with ``A`` the second moment of the channels, averaged
over places: the nearest matrix of this form, with the same trace. The places become groups of the block, ``[(s w), o,
c]``; the bias is a block of its own, of one input and ``o`` outputs. Where the window has one place nothing changes.

Inputs are ``a[n, t, s, (c w)]``, channel ``c`` and place ``w`` in the window, and perhaps the ones of a bias behind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout, Piece
from nngeom.core.statistic import Inputs
from nngeom.pmat.factors import Factors, Shape, factor_shapes, of_gradients, structure_of
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock


def has_window(layout: Layout, j: LayerJacobian) -> bool:
    """Whether the inputs are windows of more than one place."""
    return _window(layout) > 1 and structure_of(j) == "kronecker"


def _window(layout: Layout) -> int:
    return layout.pieces[0].arrangement.window


def parts(layout: Layout) -> tuple[Layout, Layout | None]:
    """The weight with its places as groups, and the bias."""
    weight = layout.pieces[0]
    bias = Layout(layout.pieces[1:]) if len(layout.pieces) > 1 else None
    return Layout((Piece(weight.names, weight.offset, weight.arrangement.by_place()),)), bias


def sua_sums(layout: Layout, j: Any, sharing: str, limit: int) -> Factors:
    """The sums that :func:`sua_blocks` takes the means of: ``"c" [s, c, c]`` of inputs, averaged over places, ``"g"``,
    and ``"b"`` the bias's own.
    """
    n, _, s, _ = j.a.shape
    positions = n / j.share if not j.counted else j.spread[0].to(j.a).view(-1, 1, 1)
    ones = j.a.new_ones(s, 1, 1) * (positions if sharing == "expand" else n)
    channels = Inputs(lambda: _channels(j, _window(layout), sharing, limit, bias=len(layout.pieces) > 1))
    return {"g": of_gradients(j.g, sharing, limit, j.share), "b": Inputs(ones), "c": channels}


def _channels(j: Any, window: int, sharing: str, limit: int, *, bias: bool) -> Tensor:
    a = j.a if sharing == "expand" else j.share * j.a.sum(1, keepdim=True)
    rows = _windows(a, window, bias=bias).permute(2, 0, 1, 4, 3).flatten(1, 3)  # [s (n t w) c]
    narrow = rows.shape[-1] <= limit
    return (torch.stack([linalg.gram(r) for r in rows]) if narrow else rows.square().sum(1)) / window


def _windows(a: Tensor, window: int, *, bias: bool) -> Tensor:
    result: Tensor = (a[..., :-1] if bias else a).unflatten(-1, (-1, window))
    return result


def sua_shapes(layout: Layout, j: Any, limit: int) -> list[tuple[Shape, Shape]]:
    """The shapes of the factors of :func:`sua_blocks`, of the weight and of the bias."""
    weight, bias = parts(layout)
    s, o, c = weight.sizes
    ((_, g),) = factor_shapes(j, limit)
    blocks: list[tuple[Shape, Shape]] = [((s, c) if c > limit else (s, c, c), (s, *g[1:]))]
    return blocks if bias is None else [*blocks, ((g[0], 1, 1), g)]


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
    ua, ug = (u[::window] if isinstance(u, Tensor) else None for u in (basis.ua, basis.ug))
    squares = _rotated(j, window, ua, ug, bias=bias is not None).square()
    if bias is None:
        return {weight: {"d": _by_place(squares, window)}}
    return {weight: {"d": _by_place(squares[..., :-1], window)}, bias: {"d": squares[..., -1:]}}


def _rotated(j: Any, window: int, ua: Tensor | None, ug: Tensor | None, *, bias: bool) -> LayerJacobian:
    """Rows in the basis ``ua [s, c, c]`` of every place of the window and ``ug [s, o, o]``; a bias is its own."""
    if ua is None:
        plain: LayerJacobian = j.rotate(None, ug)
        return plain
    a = torch.einsum("ntscw,scd->ntsdw", _windows(j.a, window, bias=bias), ua).flatten(3)
    result: LayerJacobian = replace(j.rotate(None, ug), a=torch.cat([a, j.a[..., -1:]], -1) if bias else a)
    return result


def _by_place(d: Tensor, window: int) -> Tensor:
    """``[s, o, (c w)] -> [(s w), o, c]``."""
    result: Tensor = d.unflatten(-1, (-1, window)).movedim(-1, 1).flatten(0, 1)
    return result
