"""Convolutions in one to three dimensions: stride, numeric and ``"same"`` padding, dilation, groups."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nngeom.core.layout import Arrangement
from nngeom.layers.adapter import Call, NotStructured, Use, adapts


def as_tuple(x: int | Sequence[int], d: int) -> tuple[int, ...]:
    """``d`` numbers from one, a sequence of one, or ``d``."""
    if isinstance(x, int):
        return (x,) * d
    return tuple(x) * d if len(x) == 1 else tuple(x)


def patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[tuple[int, int]], dilation: Sequence[int]) -> Tensor:
    """The windows a convolution sees, ``[n, c, *space] -> [n, *out_space, c, *kernel]`` (a view of the padded input)."""
    if any(p != (0, 0) for p in padding):
        x = F.pad(x, [side for pair in reversed(padding) for side in pair])
    d = len(kernel)
    for axis, (k, s, r) in enumerate(zip(kernel, stride, dilation), start=2):
        x = x.unfold(axis, (k - 1) * r + 1, s)[..., ::r]
    return x.permute(0, *range(2, 2 + d), 1, *range(2 + d, 2 + 2 * d))


def grouped_patches(x: Tensor, groups: int) -> Tensor:
    """``[n, *space, c, *kernel] -> [n, *space, s, i]``: one copy of the windows."""
    d = (x.ndim - 2) // 2
    return x.reshape(*x.shape[: 1 + d], groups, -1)


def channels_last(g: Tensor, groups: int) -> Tensor:
    """``[k, n, c, *space] -> [k, n, *space, s, o]``."""
    return g.movedim(2, -1).unflatten(-1, (groups, -1))


@adapts(torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d)
def conv(call: Call, input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups: int = 1) -> Use:
    """``weight [(s o), i, *kernel]``."""
    d = weight.ndim - 2
    if input.ndim != d + 2:
        raise NotStructured
    kernel, strides, dilations = tuple(weight.shape[2:]), as_tuple(stride, d), as_tuple(dilation, d)
    if padding == "valid":
        pads = [(0, 0)] * d
    elif padding == "same":
        spans = [r * (k - 1) for k, r in zip(kernel, dilations)]
        pads = [(span // 2, span - span // 2) for span in spans]
    else:
        pads = [(p, p) for p in as_tuple(padding, d)]
    sizes = (groups, weight.shape[0] // groups, math.prod(weight.shape[1:]))
    w, b = call.whole(weight, Arrangement.plain(*sizes)), call.vector(bias, groups)
    x = call.keep(input) if w is not None else None
    return Use(
        f"conv{d}d",
        w,
        b,
        (call.out.shape[0], *call.out.shape[2:]),
        gradients=lambda g: channels_last(g, groups),
        inputs=None if x is None else lambda: grouped_patches(patches(x, kernel, strides, pads, dilations), groups),
    )
