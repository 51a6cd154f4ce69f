"""Rows whose entries are weighted: of any structure, multiplied where they are formed, never as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import memory, pairs, parts
from nngeom.core.factored import FactoredJacobian
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.tile import Tile


@dataclass(frozen=True, eq=False)
class WeightedJacobian(LayerJacobian):
    """``w * J[k, n]``, entry by entry."""

    j: LayerJacobian
    w: Tensor  # [s o i]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.j.shape

    def matrix(self) -> Tensor:
        return self.j.matrix() * self.w

    def examples(self, lo: int, hi: int) -> WeightedJacobian:
        return WeightedJacobian(self.j.examples(lo, hi), self.w)

    def cotangents(self, lo: int, hi: int) -> WeightedJacobian:
        return WeightedJacobian(self.j.cotangents(lo, hi), self.w)

    def jvp(self, v: Tensor) -> Tensor:
        return self.j.jvp(v * self.w)

    def vjp(self, u: Tensor) -> Tensor:
        return self.j.vjp(u) * self.w

    def gram(self, other: LayerJacobian) -> Tensor:
        return gram_by_pieces(self, other)


def gram_by_pieces(x: LayerJacobian, y: LayerJacobian) -> Tensor:
    """``[k, n, l, m]``: products of two sets of rows, of which the explicit ones of ``x`` fit the memory budget."""
    return torch.cat([y.jvp(x.examples(lo, hi).matrix()) for lo, hi in pieces(x)], 1)


def add_by_pieces(tile: Tile, x: LayerJacobian, y: LayerJacobian) -> None:
    """:func:`gram_by_pieces`, added to a tile."""
    for lo, hi in pieces(x):
        tile.out[:, lo:hi] += y.jvp(x.examples(lo, hi).matrix())


def pieces(x: LayerJacobian) -> Iterator[tuple[int, int]]:
    """Ranges of examples whose explicit rows, and what they are made from, fit a part of the memory budget."""
    k, n, s, o, i = x.shape
    return memory.pieces(n, 3 * k * s * o * i * x.dtype.itemsize, most=memory.budget() // 4)


@pairs.add_products.register
def _(x: WeightedJacobian, tile: Tile, y: LayerJacobian) -> None:
    if all(isinstance(j, (FactoredJacobian, FullJacobian)) for j in (x.j, y)):  # a block of the layer at a time
        pairs.by_rows(tile, x, y)
    else:
        add_by_pieces(tile, x, y)


@parts.has_positions.register
def _(j: WeightedJacobian) -> bool:
    return parts.has_positions(j.j)


@parts.features.register
def _(j: WeightedJacobian, lo: int, hi: int) -> LayerJacobian:
    w = j.w[lo:hi] if j.w.shape[0] > 1 else j.w[:, lo:hi]
    return WeightedJacobian(parts.features(j.j, lo, hi), w)


@parts.cuts_inputs.register
def _(j: WeightedJacobian) -> bool:
    return parts.cuts_inputs(j.j)


@parts.inputs.register
def _(j: WeightedJacobian, lo: int, hi: int) -> LayerJacobian:
    return WeightedJacobian(parts.inputs(j.j, lo, hi), j.w[..., lo:hi])
