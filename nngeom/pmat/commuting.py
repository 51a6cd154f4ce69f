"""Sums of blocks that commute: one Kronecker-factored eigenbasis of all of them, in which the sum is diagonal.

Multiples and differences of one matrix are such sums, matrices in an eigenbasis with those that it came from, and all
with multiples of the identity. Others have no spectrum in product form: sums of two Kronecker products with four
unlike factors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nngeom.core.linear import differentiated
from nngeom.pmat.closed import Weighted
from nngeom.pmat.kronecker import EigenBlock
from nngeom.pmat.near import along, near_basis, sum_of

# Times the root of a factor's side: products in a common eigenbasis are off by up to 6, two products in turn by up to 8
# (sides of 10 to 300, float32 and float64, multiples, differences, and sums with EKFAC), where there is none by 2e5.
ROUNDINGS = 8.0
GOLDEN = (math.sqrt(5) - 1) / 2


def commuting(terms: Sequence[Weighted]) -> EigenBlock | None:
    """The sum of ``terms`` in an eigenbasis of all of them; ``None`` where products with random vectors show that
    there is none, where none is found, for terms with a graph, or with too few digits to tell.
    """
    blocks, like = [block for _, block in terms], terms[0][1].diag()
    graph = any(differentiated(t) for w, block in terms for t in (w, *block.tensors()) if isinstance(t, Tensor))
    if graph or like.dtype not in (torch.float32, torch.float64):
        return None
    z = torch.randn(2, *like.shape, generator=torch.Generator().manual_seed(0), dtype=like.dtype).to(like.device)
    products = [block.mv(z) for block in blocks]
    for (x, xz), (y, yz) in itertools.pairwise(zip(blocks, products)):
        if not _equal(x.mv(yz), y.mv(xz), 4 * xz.norm() * yz.norm() / z.norm()):
            return None
    generic = [(1 + (j * GOLDEN) % 1, block) for j, block in enumerate(blocks)]  # eigenvalues of sums are apart
    basis = near_basis(generic)
    if basis is None:
        return None
    found = EigenBlock(*basis, sum_of(w * along(block, *basis) for w, block in terms))
    parts = [w * xz for (w, _), xz in zip(terms, products)]
    return found if _equal(sum_of(parts), found.mv(z), sum_of(xz.norm() for xz in parts)) else None


def _equal(x: Tensor, y: Tensor, size: Tensor) -> bool:
    """Whether products ``[k, s, o, i]`` differ by rounding of numbers of such a ``size`` only."""
    allowed = ROUNDINGS * max(x.shape[-2:]) ** 0.5 * torch.finfo(x.dtype).eps
    return bool((x - y).norm() <= allowed * size)
