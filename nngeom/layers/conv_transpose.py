"""Transposed convolutions in one to three dimensions: stride, padding, output padding, dilation, groups."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nngeom.core.layout import Arrangement
from nngeom.layers.adapter import Call, NotStructured, Use, adapts
from nngeom.layers.conv import as_tuple, channels_last

_FUNCTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def transposed_patches(x: Tensor, kernel, stride, padding, output_padding, dilation, groups: int) -> Tensor:
    """``[n, c, *space] -> [n, *out_space, s, (c / s) * prod(kernel)]``: what each output position sums over.

    Every input channel is sent through one unit kernel per kernel position.
    """
    channels, size = x.shape[1], math.prod(kernel)
    unit = torch.eye(size, dtype=x.dtype, device=x.device).reshape(1, size, *kernel)
    unit = unit.expand(channels, size, *kernel).contiguous()
    out = _FUNCTIONS[len(kernel)](x, unit, None, stride, padding, output_padding, groups=channels, dilation=dilation)
    return out.movedim(1, -1).unflatten(-1, (groups, -1))


@adapts(
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
def conv_transpose(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias=None,
    stride=1,
    padding=0,
    output_padding=0,
    groups: int = 1,
    dilation=1,
) -> Use:
    """``weight [(s i), o, *kernel]``."""
    d = weight.ndim - 2
    if input.ndim != d + 2:
        raise NotStructured
    kernel = tuple(weight.shape[2:])
    rows, out, size = weight.shape[0] // groups, weight.shape[1], math.prod(kernel)
    arrangement = Arrangement((groups, rows, out, size), (0, 2, 1, 3), (groups, out, rows * size), window=size)
    w, b = call.whole(weight, arrangement), call.vector(bias, groups)
    x = call.keep(input) if w is not None else None
    strides, pads, extra, dilations = (as_tuple(v, d) for v in (stride, padding, output_padding, dilation))
    return Use(
        f"conv_transpose{d}d",
        w,
        b,
        (call.out.shape[0], *call.out.shape[2:]),
        gradients=lambda g: channels_last(g, groups),
        channels=1,
        serial=True,
        inputs=None
        if x is None
        else lambda: transposed_patches(x, kernel, strides, pads, extra, dilations, groups=groups),
    )
