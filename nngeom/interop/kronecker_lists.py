"""Blocks of a matrix as the list of Kronecker factors that ``laplace-torch`` computes with, an entry a parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core.errors import ArgumentError, StructureError
from nngeom.core.layout import Layout, Piece
from nngeom.interop.laplace_torch import Kron
from nngeom.pmat.block import Block
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.pmat import PMat
from nngeom.space.collection import LayerCollection

Factors = list[Tensor]  # [rows, columns] of a weight seen as (first axis, the others), or [block], whole


class Factorization(Kron):
    """``kfacs``, the factors of every parameter: a pair, or one whole block where a parameter has no two factors.

    The sum with factors that are all zero, as laplace starts from, takes the other's structure.
    """

    kfacs: list[Any]

    def __add__(self, other: Kron) -> Self:
        if not isinstance(other, Kron) or len(self) != len(other):
            raise ArgumentError(f"factors of {len(self)} parameters cannot be added to {other!r}")
        theirs: list[Any] = other.kfacs
        sums: list[Any] = [_sum(x, y, j) for j, (x, y) in enumerate(zip(self.kfacs, theirs))]
        return type(self)(sums)

    __radd__ = __add__

    def __mul__(self, scalar: float | Tensor) -> Self:
        return type(self)(super().__mul__(scalar).kfacs)

    __rmul__ = __mul__


def _sum(x: Factors, y: Factors, parameter: int) -> Factors:
    if [f.shape for f in x] == [f.shape for f in y]:
        return [f + h for f, h in zip(x, y)]
    for zeros, other in ((x, y), (y, x)):
        if not any(f.any() for f in zeros):
            return other
    raise ArgumentError(
        f"parameter number {parameter} has factors {[tuple(f.shape) for f in x]} in one sum and "
        f"{[tuple(f.shape) for f in y]} in another; expected the same structure in every batch"
    )


def unpaired(matrix: PMat) -> list[str]:
    """The parameters whose block is a product of factors, but none over the first axis and over the others: of groups,
    transposed kernels, windows in another order.
    """
    names: list[str] = []
    table = matrix.layer_collection.offsets()
    for layout, block in matrix.blocks.items():
        if not isinstance(block, KroneckerBlock) or block.g.shape[:2] == (1, 1):
            continue  # exact already
        whole = slice(0, block.sizes[2])
        if any(_pair(p, block, whole, table[p.names[0]][1]) is None for p in layout.pieces[:1]):
            names += layout.names
    return names


def require_room(collection: LayerCollection, names: list[str], limit: int) -> None:
    """Raise :class:`StructureError` for a parameter of more than ``limit`` entries, whose exact block is not kept."""
    for name in names:
        entries = math.prod(collection.offsets()[name][1])
        if entries > limit:
            raise StructureError(
                f"parameter {name!r} is no Kronecker product of a factor over its first axis and one over the others, "
                f"and its exact block of {entries}**2 numbers is above block_limit={limit}: raise block_limit in "
                "backend_kwargs, or take hessian_structure='diag'"
            )


def factorization(matrix: PMat, examples: int, of: int) -> Factorization:
    """The sum over the ``examples`` that ``matrix`` is a mean over, scaled so that sums over batches of a data set
    ``of`` so many are its Kronecker products: the second factors are means, the first ones sums.
    """
    found = {name: f for layout, block in matrix.blocks.items() for name, f in _of_block(matrix, layout, block)}
    kfacs: list[Any] = [_scaled(found[name], examples, of) for name in matrix.layer_collection.names]
    return Factorization(kfacs)


def _scaled(factors: Factors, examples: int, of: int) -> Factors:
    first, *rest = factors
    return [examples * first, *(examples / of * f for f in rest)]


def _of_block(matrix: PMat, layout: Layout, block: Block) -> Iterator[tuple[str, Factors]]:
    """Name and factors of every parameter of a block."""
    table, lo = matrix.layer_collection.offsets(), 0
    for piece in layout.pieces:
        columns = slice(lo, lo := lo + piece.arrangement.sizes[2])
        pair = _pair(piece, block, columns, table[piece.names[0]][1])
        if pair is not None:
            yield piece.names[0], pair
            continue
        part = block if len(layout.pieces) == 1 else block.restricted(list(range(columns.start, columns.stop)))
        whole = _whole(piece, part)
        for name in piece.names:
            offset, shape = table[name]
            mine = slice(offset - piece.offset, offset - piece.offset + math.prod(shape))
            yield name, [whole[mine, mine]]


def _pair(piece: Piece, block: Block, columns: slice, shape: tuple[int, ...]) -> Factors | None:
    """The factors of a weight over its first axis and over the others, where the block has them."""
    if not isinstance(block, KroneckerBlock) or len(shape) < 2 or block.sizes[0] > 1 or len(piece.names) > 1:
        return None
    a, g = _dense(block.a[0]), _dense(block.g[0])
    a = a[columns, columns]
    if piece.arrangement.is_plain() and shape[0] == len(g):
        return [g, a]
    if len(shape) == 2 and piece.arrangement.order == (0, 2, 1) and shape[0] == len(a):  # a table, input-major
        return [a, g]
    return None


def _dense(factor: Tensor) -> Tensor:
    return torch.diag(factor) if factor.ndim == 1 else factor


def _whole(piece: Piece, block: Block) -> Tensor:
    """The matrix of a ``block`` over one ``piece`` alone, in the order of the flat vector."""
    if isinstance(block, KroneckerBlock) and block.sizes[0] == 1:
        m = torch.kron(_dense(block.g[0]), _dense(block.a[0]))
    else:
        m = block.dense()
    if piece.arrangement.is_plain():
        return m
    order = (Layout((piece,)).indices(m.device).flatten() - piece.offset).argsort()
    return m[order][:, order]
