"""What is added to a matrix before it is inverted.

A number is Tikhonov damping, exact for every representation: ``(M + x I)^-1``. Other meanings are objects. A number
may be a 0-d tensor: where it requires a gradient, what is computed with it has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError, DampingError, UnsupportedError
from nngeom.core.linear import differentiated


@dataclass(frozen=True)
class Tikhonov:
    """``M + value * I``; ``indefinite``: what is inverted may have negative eigenvalues, and must not have zero."""

    value: float | Tensor
    indefinite: bool = False


@dataclass(frozen=True)
class FactoredTikhonov:
    """Damping of the two Kronecker factors, ``(A + pi sqrt(x) I) (x) (G + sqrt(x)/pi I)`` with ``x`` the ``value``.

    ``balanced``: ``pi = sqrt((tr A / dim A) / (tr G / dim G))`` (Martens & Grosse 2015, section 6.3); else ``pi = 1``,
    under which layers with small gradients are damped on the side of the gradients alone (George et al. 2018, A.4).
    Under EKFAC, whose spectrum is no product any more, the additive form of ``pi = 1``, ``s + x + sqrt(x) s_A + sqrt(x)
    s_B``. Blocks without Kronecker factors get ``x`` as plain Tikhonov damping.
    """

    value: float | Tensor
    balanced: bool = True


@dataclass(frozen=True)
class Cutoff:
    """Pseudo-inverse: eigenvalues below ``value`` count as zero, and so do their inverses. No gradient in ``value``.

    ``top``: of a matrix over parameters, only so many of its largest eigenvalues count, and those equal to the last of
    them; never any that are rounding error of zero.
    """

    value: float = 0.0
    top: int | None = None

    def __post_init__(self) -> None:
        if self.top is not None and (isinstance(self.top, bool) or not isinstance(self.top, int) or self.top < 1):
            raise ArgumentError(f"top is {self.top!r}; expected a number of eigenvalues, 1 or more")


@dataclass(frozen=True)
class Relative:
    """Tikhonov damping of each block by ``value`` times its mean eigenvalue, its trace over its side.

    ``factored``: each of two Kronecker factors by ``sqrt(value)`` times its own mean eigenvalue, ``(A + sqrt(x) tr A /
    dim A) (x) (G + sqrt(x) tr G / dim G)``; under EKFAC its additive form. The solution then does not depend on the
    scale of either factor but for a number.
    """

    value: float | Tensor
    factored: bool = False


Damping = Tikhonov | FactoredTikhonov | Cutoff
_PLAIN = (Tikhonov, FactoredTikhonov)


def as_damping(damping: float | Tensor | Damping) -> Damping:
    """A checked damping object from one, a number or a 0-d tensor, which stays one where it requires a gradient.

    Raises :class:`DampingError` when negative or not finite, :class:`ArgumentTypeError` for other types, and
    :class:`ArgumentError` for a :class:`Cutoff` whose value requires a gradient.
    """
    if isinstance(damping, _PLAIN) and type(damping.value) is float and 0 <= damping.value < math.inf:
        return damping
    apart = isinstance(damping, Mapping) or hasattr(damping, "layer_collection")  # a number each for parameters
    if apart or isinstance(damping, Relative) or (isinstance(damping, Cutoff) and damping.top is not None):
        also = ", or a matrix that is added, (M + PMatDiag.from_vector(numbers)).solve(b)" if apart else ""
        raise UnsupportedError(
            f"damping is {damping!r}, which needs the blocks of a stored matrix over parameters (PMatEKFAC, "
            f"PMatBlockDiag, ...); expected a number >= 0{also}"
        )
    if not isinstance(damping, (Tikhonov, FactoredTikhonov, Cutoff)):
        damping = Tikhonov(damping)
    try:
        number = float(damping.value.detach() if isinstance(damping.value, Tensor) else damping.value)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(
            f"damping is {damping.value!r}; expected a number >= 0, FactoredTikhonov(x) or Cutoff(x)"
        ) from None
    if not math.isfinite(number) or number < 0:
        raise DampingError(f"damping is {number}; expected a finite number >= 0")
    if not isinstance(damping.value, Tensor) or not differentiated(damping.value):
        return replace(damping, value=number) if type(damping.value) is not float else damping
    if isinstance(damping, Cutoff):
        raise ArgumentError(
            "the value of a Cutoff requires a gradient, but a pseudo-inverse only jumps with it; pass Cutoff(float(x))"
        )
    return replace(damping, value=damping.value.reshape(()))
