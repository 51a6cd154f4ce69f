"""Solutions by an inverse that rounding made inexact, corrected by their residuals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MOST = 8  # corrections; each is at most a quarter of the one before


def corrected(matrix: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], b: Tensor) -> Tensor | None:
    """``x`` with ``matrix(x) = b``, ``[*b, d]``, as near as residuals in its dtype tell; ``None`` where the ``inverse``
    is too far off for that.

    What Woodbury's identity subtracts cancels: a ``b`` along large eigenvalues comes out with the condition number
    squared in its rounding error, and with the condition number after corrections. Where that is above ``1 / eps``
    residuals are as large as ``b``, and corrections would bring a ``b`` in any other direction their own rounding: then
    ``x`` is right if the inverse makes much more of ``b`` than of residuals, which lie along large eigenvalues.
    """
    x = inverse(b)
    size = before = _length(x)
    for _ in range(MOST):
        residual = b - matrix(x)
        change = inverse(residual)
        length, eps = _length(change), torch.finfo(x.dtype).eps
        if not bool((length <= before / 4).all()):  # rounding alone is left, or NaN
            return None if before is size else x
        left, whole = _length(residual), _length(b)
        if not bool((left <= whole / 4).all()):  # the change is rounded as much as x is, or more
            return x if bool((length * whole <= eps**0.5 * left * _length(x)).all()) else None
        x = x + change
        if bool((length * length <= eps * before * size).all()):  # so will the next be
            return x
        before = length
    return x


def _length(x: Tensor) -> Tensor:
    length: Tensor = x.detach().norm(dim=-1)
    return length
