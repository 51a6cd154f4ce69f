"""A matrix in a Kronecker eigenbasis near a sum of blocks, for preconditioning: its diagonal in that basis is exact."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nngeom.core import bases, linalg
from nngeom.core.completed import CompletedBasis
from nngeom.core.linalg import Basis
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.closed import Weighted
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.pmat.quasi_diag import ArrowBlock

EMBEDDED = 4096  # a longer diagonal is not made a square for a preconditioner


def near(terms: Sequence[Weighted]) -> Block:
    """Eigenvectors of the partial traces of the sum, and its diagonal along them; else its diagonal."""
    basis = near_basis(terms)
    if basis is None:
        return DiagBlock(sum_of(w * block.diag() for w, block in terms))
    return EigenBlock(*basis, sum_of(w * along(block, *basis) for w, block in terms))


def near_basis(terms: Sequence[Weighted]) -> tuple[Basis | None, Basis | None] | None:
    """The eigenvectors ``ua``, ``ug`` of the partial traces of a sum; ``None`` where one of them is unknown."""
    sides = [partial_traces(block) for _, block in terms]
    if any(side is None for side in sides):
        return None
    weights = [w for w, _ in terms]
    a, g = (_total([w * side[q] for w, side in zip(weights, sides) if side is not None]) for q in (0, 1))
    return linalg.factor_eigh(a)[1], linalg.factor_eigh(g)[1]


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors."""
    first, *rest = parts
    return sum(rest, first)


def _total(factors: list[Tensor]) -> Tensor:
    """The sum of factors, as a diagonal where one of them is too long to be more."""
    diagonal = [linalg.is_diagonal(f) for f in factors]
    if all(diagonal) or (any(diagonal) and factors[0].shape[-1] > EMBEDDED):
        return sum_of(map(linalg.factor_diag, factors))
    return sum_of(torch.diag_embed(f) if linalg.is_diagonal(f) else f for f in factors)


@functools.singledispatch
def partial_traces(block: Block) -> tuple[Tensor, Tensor] | None:
    """``[s i i], [s o o]`` (or diagonals): the traces of a block over outputs, and over inputs; ``None``: unknown."""
    return None


@partial_traces.register(DiagBlock)
@partial_traces.register(EyeBlock)
def _(block: Block) -> tuple[Tensor, Tensor]:
    d = block.diag()
    return d.sum(-2), d.sum(-1)


@partial_traces.register
def _(block: ArrowBlock) -> tuple[Tensor, Tensor]:
    a, c = torch.diag_embed(block.d.sum(-2)), block.c.sum(-2)
    a[:, :-1, -1] = a[:, -1, :-1] = c
    return a, block.d.sum(-1)


@partial_traces.register
def _(block: KroneckerBlock) -> tuple[Tensor, Tensor]:
    ta, tg = (linalg.factor_diag(f).sum(-1) for f in (block.a, block.g))
    return block.a * tg.view(-1, *[1] * (block.a.ndim - 1)), block.g * ta.view(-1, *[1] * (block.g.ndim - 1))


@partial_traces.register
def _(block: EigenBlock) -> tuple[Tensor, Tensor] | None:
    da, dg = block.d.sum(-2), block.d.sum(-1)
    if any(isinstance(u, CompletedBasis) for u in (block.ua, block.ug)):
        return None
    return bases.spanned(block.ua, da), bases.spanned(block.ug, dg)


@functools.singledispatch
def along(block: Block, ua: Basis | None, ug: Basis | None) -> Tensor:
    """``[s, o, i]``: the diagonal of ``U^T M U`` in the basis ``U = ug (x) ua`` of orthonormal vectors."""
    outputs = bases.squares_transposed_times(ug, block.diag())
    return bases.squares_transposed_times(ua, outputs.mT).mT


@along.register
def _(block: KroneckerBlock, ua: Basis | None, ug: Basis | None) -> Tensor:
    a, g = (bases.diagonal_along(u, f) for f, u in ((block.a, ua), (block.g, ug)))
    return g.unsqueeze(-1) * a.unsqueeze(-2)


@along.register
def _(block: ArrowBlock, ua: Basis | None, ug: Basis | None) -> Tensor:
    diagonal = bases.squares_transposed_times(ua, bases.squares_transposed_times(ug, block.d).mT).mT
    if ua is None:
        return diagonal
    if isinstance(ua, CompletedBasis):
        ua = linalg.left(ua, torch.eye(ua.shape[-1], dtype=block.d.dtype, device=block.d.device).expand(ua.shape))
    beside = bases.squares_transposed_times(ug, block.c) @ ua[:, :-1]
    return diagonal + 2 * beside * ua[:, -1:]


@along.register
def _(block: EigenBlock, ua: Basis | None, ug: Basis | None) -> Tensor:
    return bases.overlaps_times(ua, block.ua, bases.overlaps_times(ug, block.ug, block.d).mT).mT
