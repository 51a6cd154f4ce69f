"""Which positions of the outputs a loss counts, read off its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core.errors import OutputError

_ROUNDING = 0.05  # of sums over classes, in half precision too


def counted(gradient: Tensor) -> Tensor:
    """``(n, *positions)``: whether the gradient at a position of the outputs is not zero.

    The classes of a position lie on the axis over which the gradient of a softmax cross-entropy sums to zero; of
    outputs ``(n, c)`` on the second. Raises :class:`OutputError` where several positions have no such axis.
    """
    if gradient.ndim < 2:
        return gradient != 0
    return (gradient != 0).any(1 if gradient.ndim == 2 else _classes(gradient))


def _classes(gradient: Tensor) -> int:
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    size = wide.abs().sum()
    if not bool(torch.isfinite(size)) or not bool(size):
        return gradient.ndim - 1
    left = {axis: float(wide.sum(axis).abs().sum() / size) for axis in range(1, gradient.ndim)}
    best = min(left, key=lambda axis: left[axis])
    if left[best] > _ROUNDING:
        raise OutputError(
            f"reduction='token_mean' counts the positions of a cross-entropy, whose gradient sums to zero over the "
            f"classes; that at outputs {tuple(gradient.shape)} does so on no axis. Expected F.cross_entropy over all "
            "positions; for another loss say 'mean' or 'sum' over the examples"
        )
    return best
