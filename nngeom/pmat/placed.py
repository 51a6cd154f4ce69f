"""Rows of several blocks of a layer, or of several layers, as flat rows, and a matrix times them, formed when asked.

What metrics need whose blocks are not those in which rows come: dense ones, low-rank ones, operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nngeom.core import pairs
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.tied import sum_of
from nngeom.core.tile import Tile
from nngeom.core.weighted import add_by_pieces, gram_by_pieces
from nngeom.pmat.recipe import write_rows


@dataclass(frozen=True, eq=False)
class PlacedJacobian(LayerJacobian):
    """The rows of parts of a span of ``p`` parameters side by side, ``[1, 1, p]``; zero where there is no part."""

    parts: tuple[tuple[Layout, LayerJacobian], ...]  # where in the span, and what
    p: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        k, n = self.parts[0][1].shape[:2]
        return k, n, 1, 1, self.p

    def matrix(self) -> Tensor:
        k, n = self.shape[:2]
        out = torch.zeros(k, n, self.p, dtype=self.dtype, device=self.device)
        for layout, j in self.parts:
            write_rows(out, j, layout)
        return out[:, :, None, None]

    def jvp(self, v: Tensor) -> Tensor:
        flat = v[..., 0, 0, :]
        return sum_of([j.jvp(layout.gather(flat).to(j.dtype)).to(v.dtype) for layout, j in self.parts])

    def vjp(self, u: Tensor) -> Tensor:
        out = u.new_zeros(*u.shape[:-2], self.p)
        for layout, j in self.parts:
            layout.scatter_(out, j.vjp(u.to(j.dtype)).to(u.dtype))
        return out[..., None, None, :]

    def examples(self, lo: int, hi: int) -> PlacedJacobian:
        return replace(self, parts=tuple((layout, j.examples(lo, hi)) for layout, j in self.parts))

    def cotangents(self, lo: int, hi: int) -> PlacedJacobian:
        return replace(self, parts=tuple((layout, j.cotangents(lo, hi)) for layout, j in self.parts))

    def gram(self, other: LayerJacobian) -> Tensor:
        return gram_by_pieces(other, self).permute(2, 3, 0, 1)


@dataclass(frozen=True, eq=False)
class AppliedJacobian(LayerJacobian):
    """``M J[k, n]``, formed for as many examples at a time as fit the memory budget."""

    j: LayerJacobian
    product: Callable[[Tensor], Tensor]  # [*b s o i] -> [*b s o i]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.j.shape

    def matrix(self) -> Tensor:
        return self.product(self.j.matrix())

    def examples(self, lo: int, hi: int) -> AppliedJacobian:
        return replace(self, j=self.j.examples(lo, hi))

    def cotangents(self, lo: int, hi: int) -> AppliedJacobian:
        return replace(self, j=self.j.cotangents(lo, hi))

    def gram(self, other: LayerJacobian) -> Tensor:
        return gram_by_pieces(self, other)


@pairs.add_products.register
def _(x: AppliedJacobian, tile: Tile, y: LayerJacobian) -> None:
    add_by_pieces(tile, x, y)


def within(span: Layout) -> Callable[[Layout], Layout]:
    """Where a layout of some of the parameters of a ``span`` lies in it, as a layout of the span's own ``[p]``."""
    move: dict[str, int] = {}
    at = 0
    for piece in span.pieces:
        move |= dict.fromkeys(piece.names, at - piece.offset)
        at += piece.stop - piece.offset

    @functools.cache
    def local(layout: Layout) -> Layout:
        return Layout(tuple(replace(p, offset=p.offset + move[p.names[0]]) for p in layout.pieces))

    return local
