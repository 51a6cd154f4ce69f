"""Convolutions in one to three dimensions: stride, numeric and ``"same"`` padding, dilation, groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    *,
    ones: bool,
    empty: Callable[..., Tensor],
) -> Tensor:
    """The windows a convolution sees, and ones: ``[n, c, *space] -> [n, *out_space, s, i]``, one copy of the input's
    windows into ``empty(sizes, x)``.

    In memory the positions of all examples lie side by side, one row an entry of the window: that is how the input has
    them, and what products over examples and positions want.
    """
    if any(p != (0, 0) for p in padding):
        x = F.pad(x, [side for pair in reversed(padding) for side in pair])
    d, n = len(kernel), x.shape[0]
    for axis, (k, s, r) in enumerate(zip(kernel, stride, dilation), start=2):
        x = x.unfold(axis, (k - 1) * r + 1, s)[..., ::r]
    windows = x.unflatten(1, (groups, -1)).permute(
        1, 2, *range(3 + d, 3 + 2 * d), 0, *range(3, 3 + d)
    )  # [s c *kernel n *out]
    space, i = windows.shape[-d:], math.prod(windows.shape[1 : 2 + d])
    if x.requires_grad:
        rows = windows.reshape(groups, i, n, *space)
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if ones else rows
    else:
        rows = empty((groups, i + ones, n, *space), x)
        rows[:, :i].view(windows.shape).copy_(windows)
        rows[:, i:] = 1
    return rows.permute(2, *range(3, 3 + d), 0, 1)


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
    w, b = call.whole(weight, Arrangement.plain(*sizes, window=math.prod(kernel))), call.vector(bias, groups)
    x = call.keep(input) if w is not None else input

    def windows(empty: Callable[..., Tensor], *, ones: bool) -> Tensor:
        return patches(x, kernel, strides, pads, dilations, groups, ones=ones, empty=empty)

    return Use(
        f"conv{d}d",
        w,
        b,
        (call.out.shape[0], *call.out.shape[2:]),
        gradients=lambda g: channels_last(g, groups),
        channels=1,
        serial=True,
        inputs=None if w is None else lambda: windows(lambda sizes, like: like.new_empty(*sizes), ones=False),
        copied=None if w is None else windows,
    )
