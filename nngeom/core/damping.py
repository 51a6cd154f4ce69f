"""What is added to a matrix before it is inverted.

A number is Tikhonov damping, exact for every representation: ``(M + x I)^-1``. Other meanings are objects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nngeom.core.errors import ArgumentTypeError, DampingError


@dataclass(frozen=True)
class Tikhonov:
    """``M + value * I``."""

    value: float


@dataclass(frozen=True)
class FactoredTikhonov:
    """Damping of the two Kronecker factors, ``(A + pi sqrt(x) I) (x) (G + sqrt(x)/pi I)``.

    ``balanced``: ``pi = sqrt((tr A / dim A) / (tr G / dim G))`` (Martens & Grosse 2015, section 6.3); else ``pi = 1``, under
    which layers with small gradients are damped on the side of the gradients alone (George et al. 2018, A.4). Under
    EKFAC, whose spectrum is no product any more, the additive form of ``pi = 1``, ``s + x + sqrt(x) s_A + sqrt(x) s_B``.
    Blocks without Kronecker factors get ``x`` as plain Tikhonov damping.
    """

    value: float
    balanced: bool = True


@dataclass(frozen=True)
class Cutoff:
    """Pseudo-inverse: eigenvalues below ``value`` count as zero, and so do their inverses."""

    value: float


Damping = Tikhonov | FactoredTikhonov | Cutoff


def as_damping(damping: float | Damping) -> Damping:
    """A checked damping object; raises :class:`DampingError` when negative or not finite."""
    if not isinstance(damping, (Tikhonov, FactoredTikhonov, Cutoff)):
        try:
            damping = Tikhonov(float(damping))
        except (TypeError, ValueError):
            raise ArgumentTypeError(
                f"damping is {damping!r}; expected a number >= 0, FactoredTikhonov(x) or Cutoff(x)"
            ) from None
    if not math.isfinite(damping.value) or damping.value < 0:
        raise DampingError(f"damping is {damping.value}; expected a finite number >= 0")
    return damping
