"""Blocks seen from the eigenbasis ``U = ug (x) ua`` of a Kronecker product: ``U^T M U`` in its structure."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from nngeom.core import linalg
from nngeom.core.completed import CompletedBasis
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.pmat.near import sum_of


@functools.singledispatch
def turned(block: Block, ua: Tensor | None, ug: Tensor | None) -> Block | None:
    """``U^T M U``; ``None`` where it has no structure of its own."""
    return block if ua is ug is None else None


@turned.register
def _(block: EyeBlock, ua: Tensor | None, ug: Tensor | None) -> Block | None:
    return block


@turned.register
def _(block: DiagBlock, ua: Tensor | None, ug: Tensor | None) -> Block | None:
    return block if ua is ug is None else EigenBlock(_overlaps(ua, None), _overlaps(ug, None), block.d)


@turned.register
def _(block: KroneckerBlock, ua: Tensor | None, ug: Tensor | None) -> Block | None:
    return KroneckerBlock(_between(ua, block.a), _between(ug, block.g))


@turned.register
def _(block: EigenBlock, ua: Tensor | None, ug: Tensor | None) -> Block | None:
    if ua is ug is None:
        return block
    if any(isinstance(u, CompletedBasis) for u in (block.ua, block.ug)):
        return None
    return EigenBlock(_overlaps(ua, block.ua), _overlaps(ug, block.ug), block.d)  # type: ignore[arg-type]


def _overlaps(u: Tensor | None, own: Tensor | None) -> Tensor | None:
    """``u^T own``."""
    if u is None:
        return own
    return u.mT.contiguous() if own is None else u.mT @ own


def _between(u: Tensor | None, factor: Tensor) -> Tensor:
    """``u^T F u``."""
    return factor if u is None else u.mT @ linalg.left(factor, u)


def weighted_trace(terms: Sequence[tuple[float, Block]], weight: Tensor) -> Tensor | None:
    """``tr (R M R)^2 = tr R^2 M R^2 M`` of a sum ``M`` of ``terms``, for a diagonal ``R^2`` of entries ``weight [s, o,
    i]``; ``None`` where a term is neither a Kronecker product nor a multiple of the identity.

    Of two products it is the sum of ``weight * ((G1 * G2) weight (A1 * A2)^T)``.
    """
    pairs = []
    for j, (w, x) in enumerate(terms):
        for v, y in terms[j:]:
            inner = _weighted_inner(x, y, weight)
            if inner is None:
                return None
            pairs.append((1 if x is y else 2) * w * v * inner)
    return sum_of(pairs)


def _weighted_inner(x: Block, y: Block, weight: Tensor) -> Tensor | None:
    """``tr R^2 M R^2 N``."""
    if isinstance(x, EyeBlock):
        return x.c * (weight.square() * y.diag()).sum()
    if isinstance(y, EyeBlock):
        return _weighted_inner(y, x, weight)
    if not isinstance(x, KroneckerBlock) or not isinstance(y, KroneckerBlock):
        return None
    return (weight * linalg.right(linalg.left(_entries(x.g, y.g), weight), _entries(x.a, y.a))).sum()


def _entries(x: Tensor, y: Tensor) -> Tensor:
    """The product of the entries of two factors, as a factor."""
    if linalg.is_diagonal(x) or linalg.is_diagonal(y):
        return linalg.factor_diag(x) * linalg.factor_diag(y)
    return x * y
