"""Factors of square matrices that need not be symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core.errors import SingularError


def lu(m: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """The factors of a square ``m [p, p]``, as ``torch.linalg.lu_factor``; raises :class:`SingularError` on zeros."""
    factors, order, _ = torch.linalg.lu_factor_ex(m)
    pivots = factors.detach().diagonal().abs()
    if bool((pivots <= m.shape[-1] * torch.finfo(m.dtype).eps * m.detach().abs().max()).any()):
        raise SingularError(f"{what} is singular; use a larger damping")
    return factors, order
