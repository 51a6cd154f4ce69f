"""Linear maps: ``F.linear`` and products with a parameter matrix, with any number of middle axes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nngeom.layers import stacked
from nngeom.layers.adapter import Call, Use, adapts


def _use(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Use:
    """``x [*lead, i]``, ``weight [o, i]``, ``bias [o]``."""
    w, b = call.matrix(weight), call.vector(bias)
    kept = call.keep(x) if w is not None else None
    return Use(
        "linear",
        w,
        b,
        tuple(call.out.shape[:-1]),
        gradients=lambda g: g.unsqueeze(-2),
        inputs=None if kept is None else lambda: kept.unsqueeze(-2),
        product=True,
    )


@adapts(F.linear)
def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use:
    """``input @ weight.T + bias``."""
    return _use(call, input, weight, bias)


@adapts(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.mm, torch.Tensor.mm)
def matmul(call: Call, input: Tensor, other: Tensor) -> Use | None:
    """``input @ other`` with a parameter matrix on the right, or a stack of matrices on either side."""
    if input.ndim == other.ndim == 3:
        return stacked.bmm(call, input, other)
    if call.is_parameter(input) or other.ndim != 2 or input.ndim == 0:
        return None
    return _use(call, input, other.mT, None) if input.ndim > 1 else None


@adapts(torch.addmm, torch.Tensor.addmm)
def addmm(call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Use | None:
    """``input + mat1 @ mat2`` with a parameter matrix ``mat2`` and a bias ``input``."""
    if beta != 1 or alpha != 1 or call.is_parameter(mat1) or (call.is_parameter(input) and input.ndim != 1):
        return None
    return _use(call, mat1, mat2.mT, input if input.ndim == 1 else None)
