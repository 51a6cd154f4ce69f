"""The gradient of softmax cross-entropy in the logits, to be differentiated once more in reverse mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nngeom.cotangents import softmax
from nngeom.cotangents.softmax import Labels


def slope(logits: Tensor, labels: Labels) -> Tensor:
    """:func:`~nngeom.cotangents.softmax.residual`, differentiable in the logits, the labels being constants."""
    return _Slope.apply(logits, labels)


class _Slope(torch.autograd.Function):
    """Without rules for function transforms, which take twice as long as what is computed."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Labels) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.labels = labels
        return softmax.residual(logits, labels)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        (logits,) = ctx.saved_tensors
        return softmax.times(logits, x, ctx.labels.totals(logits)), None
