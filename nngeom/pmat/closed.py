"""Sums of two blocks of different kinds that are a block again."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from nngeom.core.linear import differentiated
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.dense import DenseBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.group import GroupBlock, by_group, coarser
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.pmat.low_rank import LowRankBlock
from nngeom.pmat.quasi_diag import ArrowBlock, SpikeBlock, UnitBlock

Weighted = tuple[float | Tensor, Block]


def reduced(terms: Sequence[Weighted]) -> list[Weighted]:
    """The terms of a sum over one layout, as few as they are in closed form."""
    kept: list[Weighted] = []
    for term in sorted(terms, key=lambda t: isinstance(t[1], EyeBlock)):
        for j, other in enumerate(kept):
            total = None if len(terms) > 2 and has_slope(term) else closed_sum(other, term)
            if total is not None:
                kept[j] = (1.0, total)
                break
        else:
            kept.append(term)
    return kept if len(kept) in (1, len(terms)) else reduced(kept)


def has_slope(term: Weighted) -> bool:
    """A multiple of the identity whose factor has a graph, which iterative solves keep when it stays by itself."""
    return isinstance(term[1], EyeBlock) and (differentiated(term[0]) or differentiated(term[1].c))


def closed_sum(x: Weighted, y: Weighted) -> Block | None:
    """``x + y`` as a block, where it is of a kind that is known; else ``None``."""
    if isinstance(x[1], KroneckerBlock) and not isinstance(y[1], (EyeBlock, DenseBlock, GroupBlock)):
        return None
    a, b = x[1].scaled(x[0]), y[1].scaled(y[0])
    same = a.added(b)
    if same is None:
        same = plus(a, b)
    return plus(b, a) if same is None else same


@functools.singledispatch
def plus(x: Block, y: Block) -> Block | None:
    """``x + y``, by what is known of the kind of ``x``."""
    return None


@plus.register
def _(x: DiagBlock, y: Block) -> Block | None:
    return DiagBlock(x.d + y.diag()) if isinstance(y, EyeBlock) else None


@plus.register
def _(x: DenseBlock, y: Block) -> Block | None:
    return DenseBlock(x.m + y.dense())


@plus.register
def _(x: GroupBlock, y: Block) -> Block | None:
    m = by_group(y)
    few = min(len(m), len(x.m))
    return GroupBlock(coarser(x.m, few) + coarser(m, few), *x.sizes)


@plus.register(ArrowBlock)
@plus.register(SpikeBlock)
@plus.register(UnitBlock)
def _(x: ArrowBlock | SpikeBlock | UnitBlock, y: Block) -> Block | None:
    if isinstance(y, (EyeBlock, DiagBlock)) and isinstance(x, ArrowBlock):
        return ArrowBlock(x.d + y.diag(), x.c)
    if not isinstance(y, (EyeBlock, DiagBlock, ArrowBlock, SpikeBlock, UnitBlock)):
        return None
    a, b = (coarser(by_group(block), x.sizes[0] * x.sizes[1]) for block in (x, y))
    return UnitBlock((a + b).view(*x.sizes, -1))


@plus.register
def _(x: KroneckerBlock, y: Block) -> Block | None:
    return plus(x.eigen(), y) if isinstance(y, EyeBlock) else None


@plus.register
def _(x: EigenBlock, y: Block) -> Block | None:
    if isinstance(y, EyeBlock):
        return EigenBlock(x.ua, x.ug, x.d + y.c)
    return x.merged(y, 1.0, 1.0)


@plus.register
def _(x: LowRankBlock, y: Block) -> Block | None:
    if not isinstance(y, EyeBlock):
        return None
    return LowRankBlock(x.r, x.sign, x.shift + (y.c if differentiated(y.c) else float(y.c)))
