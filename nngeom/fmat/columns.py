"""What a kernel is multiplied or solved with: vectors of function space, and what has columns of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from nngeom.space.fvector import FVector

C = TypeVar("C")
C_co = TypeVar("C_co", covariant=True)


class HasColumns(Protocol[C_co]):
    """What maps some space to function space, column by column (kernels, Jacobians), or is one such column."""

    def map_columns(self, f: Callable[[FVector], FVector]) -> C_co:
        """``f`` on all columns at once."""


def has_columns(f: Any) -> bool:
    """Whether ``f`` is a kernel or a Jacobian, not a vector."""
    return hasattr(f, "map_columns") and not isinstance(f, FVector)
