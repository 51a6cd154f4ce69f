"""Inverses of several factors at once: small ones take less time than the question whether they are regular."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nngeom.core.linalg import factor_inverse, is_diagonal

CLEAR = 2.0  # times what rounding may make of a zero pivot, from which on one surely is none; 1.001 would do


def factor_inverses(factors: Sequence[Tensor], words: Sequence[str]) -> list[Tensor]:
    """The inverse of every factor, called as ``words`` say; raises :class:`SingularError` of the first that has none,
    as :func:`~nngeom.core.linalg.factor_inverse` of it.
    """
    if len({(f.dtype, f.device) for f in factors}) == 1 and not any(map(is_diagonal, factors)):
        roots, failed = zip(*map(torch.linalg.cholesky_ex, factors))
        if _are_regular(factors, roots, failed):
            return [torch.cholesky_inverse(root) for root in roots]
    return list(map(factor_inverse, factors, words))


def _are_regular(factors: Sequence[Tensor], roots: Sequence[Tensor], failed: Sequence[Tensor]) -> bool:
    """Whether no pivot of the ``roots`` of ``factors`` is near what counts as zero; ``False`` where one by one they
    may be.
    """
    if any(torch.cat([x.view(-1) for x in failed]).tolist()) or not all(f.numel() for f in factors):
        return False
    sizes = torch._foreach_norm([_diagonal(f) for f in factors], math.inf)
    pivots = torch._foreach_norm([_diagonal(root) for root in roots], -math.inf)
    numbers, count = torch.stack([*sizes, *pivots]).tolist(), len(factors)
    eps = torch.finfo(factors[0].dtype).eps
    return all(
        pivot * pivot > CLEAR * f.shape[-1] * eps * size  # False of NaN
        for f, size, pivot in zip(factors, numbers, numbers[count:])
    )


def _diagonal(m: Tensor) -> Tensor:
    return m.detach().diagonal(dim1=-2, dim2=-1)
