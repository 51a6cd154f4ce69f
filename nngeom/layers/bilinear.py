"""Bilinear maps: affine in the parameter, with the products of the two inputs as input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nngeom.core.layout import Arrangement
from nngeom.layers.adapter import Call, Use, adapts


@adapts(F.bilinear, torch.bilinear)
def bilinear(call: Call, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use:
    """``x1^T weight[o] x2 + bias[o]``, ``weight [o, i, j]``."""
    o, i, j = weight.shape
    slot, x, y = call.whole(weight, Arrangement.plain(1, o, i * j)), call.keep(input1), call.keep(input2)
    return Use(
        "bilinear",
        slot,
        call.vector(bias),
        tuple(call.out.shape[:-1]),
        gradients=lambda g: g.unsqueeze(-2),
        inputs=None if slot is None else lambda: (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2).unsqueeze(-2),
    )
