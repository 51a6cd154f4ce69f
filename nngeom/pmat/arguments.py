"""Arguments that all parameter-space matrices take, checked: factors, dampings, kinds of norms."""

from __future__ import annotations

import numbers
from typing import Any

from torch import Tensor

from nngeom.core.damping import Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.given_plainly import require_real
from nngeom.core.linear import differentiated


def as_factor(c: Any) -> float | Tensor:
    """A number ``c`` to scale by; a 0-d tensor stays one where it requires a gradient."""
    if not isinstance(c, numbers.Real) and not (isinstance(c, Tensor) and c.ndim == 0):
        given = type(c).__name__
        raise ArgumentTypeError(f"cannot scale a matrix by {given}; expected a number (M @ N is the product)")
    require_real(c, "the factor")
    if not isinstance(c, Tensor):
        return float(c)
    return c if differentiated(c) else float(c.detach())


def as_divisor(c: Any) -> float | Tensor:
    """One over a number ``c`` to divide by, as :func:`as_factor`; raises :class:`ArgumentError` for zero."""
    c = as_factor(c)
    if not isinstance(c, Tensor) and c == 0:
        raise ArgumentError("cannot divide by 0; expected another number")
    divisor: float | Tensor = 1 / c
    return divisor


def require_tikhonov(damping: Any, what: str) -> Tikhonov:
    """A plain number as ``damping``, checked; ``what``: what takes it."""
    d = as_damping(damping)
    if not isinstance(d, Tikhonov):
        raise ArgumentError(f"{what} takes a number as damping, got {damping!r}; expected a number >= 0")
    return d


def is_spectral(kind: Any) -> bool:
    """Whether the ``kind`` of a norm is 2, the largest absolute eigenvalue."""
    return isinstance(kind, numbers.Real) and kind == 2


def require_frobenius(kind: Any) -> None:
    """Only the Frobenius norm is offered, as ``kind``."""
    if not (kind is None or (isinstance(kind, str) and kind == "fro")):
        raise ArgumentError(
            f"norm({kind!r}) is not offered; expected 'fro', of a stored matrix also 2 (M.eigh()[0]: all eigenvalues)"
        )
