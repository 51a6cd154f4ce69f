"""Arguments that all parameter-space matrices take, checked: factors, dampings, kinds of norms."""

from __future__ import annotations

import numbers
from typing import Any

from torch import Tensor

from nngeom.core.damping import Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.linear import differentiated


def as_factor(c: Any) -> float | Tensor:
    """A number ``c`` to scale by; a 0-d tensor stays one where it requires a gradient."""
    if not isinstance(c, numbers.Real) and not (isinstance(c, Tensor) and c.ndim == 0):
        given = type(c).__name__
        raise ArgumentTypeError(f"cannot scale a matrix by {given}; expected a number (M @ N is the product)")
    if not isinstance(c, Tensor):
        return float(c)
    return c if differentiated(c) else float(c.detach())


def require_tikhonov(damping: Any, what: str) -> Tikhonov:
    """A plain number as ``damping``, checked; ``what``: what takes it."""
    d = as_damping(damping)
    if not isinstance(d, Tikhonov):
        raise ArgumentError(f"{what} takes a number as damping, got {damping!r}; expected a number >= 0")
    return d


def require_frobenius(kind: Any) -> None:
    """Only the Frobenius norm is offered, as ``kind``."""
    if kind not in ("fro", None):
        raise ArgumentError(
            f"norm({kind!r}) is not offered; expected 'fro', of a stored matrix also 2 (M.eigh()[0]: all eigenvalues)"
        )
