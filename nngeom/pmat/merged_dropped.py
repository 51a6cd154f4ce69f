"""What of factors above a side limit is dropped of the mean of two matrices: at most what each of them dropped, added
up.

Of a factor ``F = K + L``, of which ``K`` is kept, its diagonal or diagonal blocks, the mean keeps ``K = m K1 + t K2``
and drops ``L = m L1 + t L2``, orthogonal to it: ``|L| <= m |L1| + t |L2|``. Where ``|K|`` is not known, ``|L| / |K|``
is at most the root of the sum of the squares of ``|Lj| / |Kj|``, for the entries of ``K1 * K2`` do not add up to less
than zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.layout import Layout
from nngeom.pmat.block import Block
from nngeom.pmat.dropped import WHOLE
from nngeom.pmat.kronecker import KroneckerBlock

Blocks = Mapping[Layout, Block]


def with_dropped(x: Blocks, y: Blocks, both: dict[Layout, Block], mine: float, theirs: float) -> dict[Layout, Block]:
    """The blocks of ``both`` matrices, the mean of ``x`` weighted by ``mine`` and of ``y`` by ``theirs``, with what
    these drop of Kronecker factors.
    """
    found = dict(both)
    for layout, block in both.items():
        given: list[Tensor | None] = [getattr(m[layout], "dropped", None) for m in (x, y)]
        if isinstance(block, KroneckerBlock) and any(s is not None for s in given):
            shares = [block.a.new_full((2, 3), WHOLE) if s is None else s for s in given]
            norms = [_kept(m, layout, shares) for m in (x, y, both)]
            sides = [_added([s[j] for s in shares], [n[j] for n in norms], mine, theirs) for j in (0, 1)]
            found[layout] = replace(block, dropped=torch.stack(sides))
    return found


def _added(shares: Sequence[Tensor], norms: Sequence[Tensor | None], mine: float, theirs: float) -> Tensor:
    """``(share, standard error, side)`` of a mean, from those of both and the norms of what both and the mean keep."""
    known = [s for s in shares if float(s[0]) != WHOLE]
    if not known:
        return shares[0]
    ratios, errors = zip(*(_ratio(s) for s in shares))
    one, other, kept = norms
    if one is None or other is None or kept is None or not bool(kept > 0):
        each = torch.stack(ratios)
        weights = each / each.norm().clamp_min(torch.finfo(each.dtype).tiny)
    else:
        weights = torch.stack([mine * one, theirs * other]) / kept
    ratio, error = (weights * torch.stack(ratios)).sum(), (weights * torch.stack(errors)).norm()
    share = ratio / (1 + ratio.square()).sqrt()
    return torch.stack([share, error / (1 + ratio.square()) ** 1.5, known[0][2]])


def _ratio(found: Tensor) -> tuple[Tensor, Tensor]:
    """``|L| / |K|`` of a share ``|L| / |F|``, and its standard error."""
    if float(found[0]) == WHOLE:
        return torch.zeros_like(found[0]), torch.zeros_like(found[0])
    share = found[0].clamp(0, 0.999)
    rest = (1 - share.square()).sqrt()
    return share / rest, found[1] / rest**3


def _kept(blocks: Blocks, layout: Layout, shares: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The norms of what is kept of both factors, both up to a number that is the same of all matrices of these blocks;
    ``None`` where it is not known.
    """
    block = blocks[layout]
    if not isinstance(block, KroneckerBlock) or block.uses:
        return None, None
    inputs, outputs = (max(int(s[j, 2]) for s in shares) for j in (0, 1))
    repeated = max(1, outputs // block.sizes[1])
    squares, reached = block.a.new_zeros(()), 0
    for part in list(blocks)[list(blocks).index(layout) :]:
        other = blocks[part]
        if reached >= inputs or not isinstance(other, KroneckerBlock):
            break
        squares = squares + linalg.factor_norm2(other.a).sum()
        reached += other.sizes[0] * other.sizes[2] // repeated
    return squares.sqrt() if reached == inputs else None, linalg.factor_norm2(block.g).sum().sqrt()
