"""Tensors in the dtype of sums; of one that has it nothing is asked: calls of torch that do nothing are not free."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core.linalg import accumulation_dtype


def widened(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` in a ``dtype``, that in which sums over examples are kept if none is given."""
    dtype = accumulation_dtype(x.dtype) if dtype is None else dtype
    return x if x.dtype == dtype else x.to(dtype)
