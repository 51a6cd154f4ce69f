"""Log-determinants of sums that have no closed form and are too large to be made dense: estimated, block by block.

With a matrix ``P`` near a block, that has the same diagonal in a Kronecker eigenbasis, ``log det M`` is ``log det P``
and the trace of the logarithm of ``B = P^-1/2 M P^-1/2``, whose diagonal is one in that basis. Its square has a known
trace where the sum is of Kronecker products, so that very little is left to estimate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nngeom.core.damping import Tikhonov
from nngeom.core.errors import ArgumentError
from nngeom.core.linear import differentiated
from nngeom.pmat.balanced import Balanced, Seen, balanced
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.eigenvalues import log_sum
from nngeom.pmat.kronecker import EigenBlock
from nngeom.pmat.near import near, sum_of
from nngeom.pmat.set_apart import set_apart, without_column
from nngeom.pmat.sum_block import ITERATED, SumBlock, number
from nngeom.pmat.turned import turned, weighted_trace
from nngeom.solve.hutchinson import Estimate
from nngeom.solve.log_trace import FIRST, NearIdentity, Quadrature, log_trace
from nngeom.solve.slq import slq_logdet

FACTORED = 768  # a block up to this side is factorised where a few random signs do not do: it takes less than many

if TYPE_CHECKING:
    from nngeom.pmat.operator import ParameterOperator
    from nngeom.pmat.partitioned import Partitioned


def estimated_logdet(
    matrix: ParameterOperator, blocks: Partitioned | None, damping: Tikhonov, how: Quadrature
) -> Estimate:
    """``log det(M + damping I)`` of a sum with its ``blocks``, in float64 where that is known, ``None`` where a part is
    not stored, with a standard error, zero where all blocks have a closed form or are small; ``how``: when to stop.
    Rows of low rank beside the blocks have a closed form.
    """
    if differentiated(damping.value):
        raise ArgumentError("an estimated logdet has no gradient in the damping; expected a number, or no estimator=")
    if blocks is None:
        like, options = torch.empty(0, dtype=matrix.dtype, device=matrix.device), {"samples": how.samples}
        x = number(damping.value)
        return slq_logdet(matrix.product, matrix.shape[0], like, x, how.steps, generator=how.generator, **options)
    bordered = None if blocks.rows is None else blocks.bordered(damping)
    if blocks.rows is not None and bordered is None:
        value = blocks.logdet(damping).to(matrix.dtype)
        return Estimate(value, torch.zeros_like(value))
    base = blocks.blocks if bordered is None else bordered.blocks
    d, dtype = matrix.shape[0], matrix.dtype
    found = [_of_block(block, damping, _shared(how, d, block), dtype) for block in base.values()]
    value = torch.stack([e.value for e in found]).sum()
    value = value if bordered is None else value + bordered.logdet()
    error = torch.stack([e.standard_error for e in found]).square().sum().sqrt()
    return Estimate(value.to(dtype), error.to(dtype))


def require_quadrature(estimator: str, how: Quadrature) -> Quadrature:
    """``how``; raises :class:`ArgumentError` for another estimator than ``"slq"``."""
    if estimator != "slq":
        raise ArgumentError(f"estimator is {estimator!r}; expected 'slq'")
    return how.checked()


def _shared(how: Quadrature, d: int, block: Block) -> Quadrature:
    """Where to stop in one block, that the squared errors of all add up to that of all ``d`` parameters."""
    return replace(how, tol=how.tol * (d / block.sizes.numel()) ** 0.5)


@torch.no_grad()
def _of_block(block: Block, damping: Tikhonov, how: Quadrature, dtype: torch.dtype) -> Estimate:
    """``dtype``: of the result."""
    closed = not isinstance(block, SumBlock) or block.side <= ITERATED or block.pencil(damping) is not None
    if closed or not isinstance(block, SumBlock):
        value = block.logdet(damping)
        return Estimate(value, torch.zeros_like(value))
    x = number(damping.value)
    matrix, logdet = near_identity(block, x)
    small = block.side <= min(FACTORED, block.limit)
    few = replace(how, samples=min(how.samples, FIRST)) if small else how
    found = log_trace(matrix, few, definite=x > 0 and block.is_positive(damping))
    if small and float(found.standard_error) > how.tol * matrix.d:
        value = block.logdet(damping)
        return Estimate(value, torch.zeros_like(value))
    value = logdet + found.value
    rounding = torch.finfo(dtype).eps * value.abs() + torch.finfo(value.dtype).eps * matrix.d
    return Estimate(value, torch.hypot(found.standard_error, rounding))


def near_identity(block: SumBlock, x: float) -> tuple[NearIdentity, Tensor]:
    """``B`` with ``M + x I = T B T^T``, in an eigenbasis of a matrix near ``M``, and ``log det T T^T``."""
    terms = [(number(w), part) for w, part in block.terms]
    found = balanced(terms, x)
    if found is not None:
        matrix, logdet = _of_balanced(found)
        return matrix, logdet + found.logdet
    nearby = near(terms)
    ua, ug = (nearby.ua, nearby.ug) if isinstance(nearby, EigenBlock) else (None, None)
    return _in_basis(nearby, [(w, turned(part, ua, ug), part) for w, part in terms], x)  # type: ignore[arg-type]


def _of_balanced(found: Balanced) -> tuple[NearIdentity, Tensor]:
    few = without_column(found)
    if few is not None:
        matrix, logdet = _in_basis(few[0], found.seen, 0.0)
        nearer = set_apart(replace(matrix, first=torch.zeros_like(matrix.first)), few[1])
        if nearer is not None:
            return nearer[0], logdet + nearer[1]
    return _in_basis(found.nearby, found.seen, 0.0)


def _in_basis(nearby: Block, seen: list[Seen], x: float) -> tuple[NearIdentity, Tensor]:
    """``B`` with ``M + x I = P^1/2 B P^1/2`` in the eigenbasis of ``P``, and ``log det P``; the terms of ``M`` as
    ``seen`` from there.
    """
    values, basis = nearby.eigh()
    least = torch.finfo(values.dtype).eps * values.abs().max()
    shifted = (values.clamp_min(0) + x).clamp_min(least)
    root, zero, sizes = shifted.rsqrt(), values.new_zeros(()), nearby.sizes

    def product(v: Tensor) -> Tensor:
        inner = root * v.reshape(-1, *sizes)
        parts = (
            w * (basis.tmv(part.mv(basis.mv(inner))) if inside is None else inside.mv(inner))
            for w, inside, part in seen
        )
        return (root * (sum_of(parts) + x * inner)).reshape(v.shape)

    first = ((values + x) / shifted - 1).sum()
    identity = EyeBlock(zero + x, *sizes)
    inside = [(w, part) for w, part, _ in seen if part is not None]
    second = weighted_trace([*inside, (1.0, identity)], 1 / shifted) if len(inside) == len(seen) else None
    d = sizes.numel()
    if second is not None:
        second = second - 2 * first - d  # tr (B - I)^2
    return NearIdentity(product, d, first, second), log_sum(shifted)
