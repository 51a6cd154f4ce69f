"""Norms of sums from inner products of their parts, without the sum."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg, memory
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.pmat.low_rank import LowRankBlock
from nngeom.pmat.near import along
from nngeom.pmat.quasi_diag import ArrowBlock

CANCELLED = 1e-6  # of the sum of the squared norms of the parts, below which inner products are not accurate


def squared_norm(total: Any) -> Tensor:
    """``|sum_j w_j M_j|_F**2`` by inner products; by the columns of the sum where an inner product has no closed form,
    or where little is left of the parts.
    """
    terms = total.terms
    closed: list[Tensor] = []
    for j, (w, x) in enumerate(terms):
        closed.append(w * w * x.squared_norm())
        for v, y in terms[j + 1 :]:
            both = inner(x, y)
            both = inner(y, x) if both is None else both
            if both is None:
                return _by_columns(total)
            closed.append(2 * w * v * both)
    whole = torch.stack(closed).sum()
    if float(whole.detach()) <= CANCELLED * sum(abs(float(c.detach())) for c in closed):
        return _by_columns(total)
    return whole


def _by_columns(block: Any) -> Tensor:
    shape = block.sizes
    p, like = shape.numel(), next(block.tensors())
    parts = []
    for lo, hi in memory.pieces(p, 4 * p * like.element_size()):
        unit = torch.zeros(hi - lo, p, dtype=like.dtype, device=like.device)
        unit[torch.arange(hi - lo), torch.arange(lo, hi)] = 1
        parts.append(block.mv(unit.view(-1, *shape)).square().sum())
    return torch.stack(parts).sum()


@functools.singledispatch
def inner(x: Block, y: Block) -> Tensor | None:
    """``<M, N> = tr M N`` where it has a closed form for ``x`` of this kind; else ``None``."""
    return None


@inner.register
def _(x: EyeBlock, y: Block) -> Tensor | None:
    return x.c * y.trace()


@inner.register
def _(x: DiagBlock, y: Block) -> Tensor | None:
    return (x.d * y.diag()).sum()


@inner.register
def _(x: KroneckerBlock, y: Block) -> Tensor | None:
    if isinstance(y, EigenBlock):
        return inner(y, x)
    if not isinstance(y, KroneckerBlock):
        return None
    return (_of_factors(x.a, y.a) * _of_factors(x.g, y.g)).sum()


def _of_factors(x: Tensor, y: Tensor) -> Tensor:
    """``[s]``."""
    if linalg.is_diagonal(x) or linalg.is_diagonal(y):
        return (linalg.factor_diag(x) * linalg.factor_diag(y)).sum(-1)
    return (x * y).flatten(1).sum(1)


@inner.register
def _(x: EigenBlock, y: Block) -> Tensor | None:
    return (x.d * along(y, x.ua, x.ug)).sum() if isinstance(y, (KroneckerBlock, EigenBlock)) else None


@inner.register
def _(x: ArrowBlock, y: Block) -> Tensor | None:
    if not isinstance(y, (KroneckerBlock, EigenBlock)):
        return None
    s, o, i = y.sizes
    unit = x.d.new_zeros(o, s, o, i)
    unit[torch.arange(o), :, torch.arange(o), -1] = 1
    last = y.mv(unit).diagonal(dim1=0, dim2=2).movedim(-1, 1)  # of every unit, the column of its last coordinate
    return (x.d * y.diag()).sum() + 2 * (x.c * last[..., :-1]).sum()


@inner.register
def _(x: LowRankBlock, y: Block) -> Tensor | None:
    forms = x.sign * (x.r * y.mv(x.r.view(-1, *y.sizes)).flatten(1)).sum()
    return forms + x.shift * y.trace()
