"""Log-determinants of sums that have no closed form and are too large to be made dense: estimated, block by block.

With a matrix ``P`` near a block, that has the same diagonal in a Kronecker eigenbasis, ``log det M`` is ``log det P``
and the trace of ``log(P^-1/2 M P^-1/2)``, which is zero where both are the same: stochastic Lanczos quadrature of that
has much less to tell than of ``M`` itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nngeom.core.damping import Tikhonov
from nngeom.core.errors import ArgumentError, UnsupportedError
from nngeom.pmat.block import Block
from nngeom.pmat.eigenvalues import log_sum
from nngeom.pmat.near import near
from nngeom.pmat.sum_block import ITERATED, SumBlock, number
from nngeom.solve.hutchinson import Estimate
from nngeom.solve.slq import slq_logdet

if TYPE_CHECKING:
    from nngeom.pmat.operator import ParameterOperator
    from nngeom.pmat.partitioned import Partitioned


@dataclass(frozen=True)
class Quadrature:
    """How many Lanczos ``steps`` from how many random ``samples``, drawn by a ``generator``."""

    steps: int = 16
    samples: int = 16
    generator: torch.Generator | None = None


def estimated_logdet(
    matrix: ParameterOperator, blocks: Partitioned | None, damping: Tikhonov, how: Quadrature
) -> Estimate:
    """``log det(M + damping I)`` of a sum with its ``blocks``, ``None`` where a part is not stored, with a standard
    error, zero where all blocks have a closed form or are small.
    """
    if blocks is None:
        like, options = torch.empty(0, dtype=matrix.dtype, device=matrix.device), {"samples": how.samples}
        x = number(damping.value)
        return slq_logdet(matrix.product, matrix.shape[0], like, x, how.steps, generator=how.generator, **options)
    if blocks.rows is not None:
        raise UnsupportedError(
            "rows of a PMatLowRank reach over all blocks of the sum, whose log-determinant is not estimated; expected "
            "no estimator="
        )
    found = [_of_block(block, damping, how) for block in blocks.blocks.values()]
    value = torch.stack([e.value for e in found]).sum()
    error = torch.stack([e.standard_error for e in found]).square().sum().sqrt()
    return Estimate(value, error)


def require_quadrature(estimator: str, how: Quadrature) -> Quadrature:
    """``how``; raises :class:`ArgumentError` for another estimator than ``"slq"``."""
    if estimator != "slq":
        raise ArgumentError(f"estimator is {estimator!r}; expected 'slq'")
    return how


@torch.no_grad()
def _of_block(block: Block, damping: Tikhonov, how: Quadrature) -> Estimate:
    closed = not isinstance(block, SumBlock) or block.side <= ITERATED or block.pencil(damping) is not None
    if closed or not isinstance(block, SumBlock):
        value = block.logdet(damping)
        return Estimate(value, torch.zeros_like(value))
    x = number(damping.value)
    values, basis = near([(number(w), part) for w, part in block.terms]).eigh()
    least = torch.finfo(values.dtype).eps * values.abs().max()
    shifted = (values.clamp_min(0) + x).clamp_min(least)
    root = shifted.rsqrt()

    def product(v: Tensor) -> Tensor:
        inner = basis.mv(root * v.view(-1, *block.sizes))
        return (root * basis.tmv(block.mv(inner) + x * inner)).view(v.shape)

    size = block.sizes.numel()
    estimate = slq_logdet(product, size, values, 0.0, how.steps, samples=how.samples, generator=how.generator)
    return Estimate(log_sum(shifted) + estimate.value, estimate.standard_error)
