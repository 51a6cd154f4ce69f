"""A matrix in a Kronecker eigenbasis near a sum of blocks, for preconditioning: its diagonal in that basis is exact."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.closed import Weighted
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock

EMBEDDED = 4096  # a longer diagonal is not made a square for a preconditioner


def near(terms: Sequence[Weighted]) -> Block:
    """Eigenvectors of the partial traces of the sum, and its diagonal along them; else its diagonal."""
    sides = [partial_traces(block) for _, block in terms]
    if any(side is None for side in sides):
        return DiagBlock(sum_of(w * block.diag() for w, block in terms))
    weights = [w for w, _ in terms]
    a, g = (_total([w * side[q] for w, side in zip(weights, sides) if side is not None]) for q in (0, 1))
    (_, ua), (_, ug) = linalg.factor_eigh(a), linalg.factor_eigh(g)
    return EigenBlock(ua, ug, sum_of(w * along(block, ua, ug) for w, block in terms))


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
def _(block: KroneckerBlock) -> tuple[Tensor, Tensor]:
    ta, tg = (linalg.factor_diag(f).sum(-1) for f in (block.a, block.g))
    return block.a * tg.view(-1, *[1] * (block.a.ndim - 1)), block.g * ta.view(-1, *[1] * (block.g.ndim - 1))


@partial_traces.register
def _(block: EigenBlock) -> tuple[Tensor, Tensor]:
    da, dg = block.d.sum(-2), block.d.sum(-1)
    a = da if block.ua is None else (block.ua * da.unsqueeze(-2)) @ block.ua.mT
    return a, dg if block.ug is None else (block.ug * dg.unsqueeze(-2)) @ block.ug.mT


@functools.singledispatch
def along(block: Block, ua: Tensor | None, ug: Tensor | None) -> Tensor:
    """``[s, o, i]``: the diagonal of ``U^T M U`` in the basis ``U = ug (x) ua`` of orthonormal vectors."""
    d = block.diag()
    d = d if ug is None else ug.square().mT @ d
    return d if ua is None else d @ ua.square()


@along.register
def _(block: KroneckerBlock, ua: Tensor | None, ug: Tensor | None) -> Tensor:
    a, g = (_in_basis(f, u) for f, u in ((block.a, ua), (block.g, ug)))
    return g.unsqueeze(-1) * a.unsqueeze(-2)


def _in_basis(factor: Tensor, u: Tensor | None) -> Tensor:
    if u is None:
        return linalg.factor_diag(factor)
    scaled = factor.unsqueeze(-1) * u if linalg.is_diagonal(factor) else factor @ u
    return (u * scaled).sum(-2)


@along.register
def _(block: EigenBlock, ua: Tensor | None, ug: Tensor | None) -> Tensor:
    left, right = _overlaps(block.ug, ug), _overlaps(block.ua, ua)
    d = block.d if left is None else left @ block.d
    return d if right is None else d @ right.mT


def _overlaps(own: Tensor | None, u: Tensor | None) -> Tensor | None:
    """``[s, p, p]``: squares of the products of new vectors with own ones."""
    if own is None or u is None:
        return own.square() if own is not None else None if u is None else u.square().mT
    return (u.mT @ own).square()
