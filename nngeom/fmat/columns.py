"""What a kernel is multiplied or solved with: vectors of function space, and what has columns of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nngeom.core.errors import ArgumentError
from nngeom.space.fvector import FVector

if TYPE_CHECKING:
    from nngeom.fmat.operator import FunctionOperator

Act = Callable[[FVector], FVector]

C = TypeVar("C")
C_co = TypeVar("C_co", covariant=True)


class HasColumns(Protocol[C_co]):
    """What maps some space to function space, column by column (kernels, Jacobians), or is one such column."""

    def map_columns(self, f: Callable[[FVector], FVector]) -> C_co:
        """``f`` on all columns at once."""


def has_columns(f: Any) -> bool:
    """Whether ``f`` is a kernel or a Jacobian, not a vector."""
    return (hasattr(f, "map_columns") or hasattr(f, "lazily")) and not isinstance(f, FVector)


def by_columns(kernel: FunctionOperator, f: Any, act: Act, transposed: Act | None = None) -> Any:
    """``act`` of a ``kernel`` on all columns of ``f``; lazy where ``f`` is known by its products.

    ``transposed``: its transpose, itself unless given.
    """
    if hasattr(f, "map_columns"):
        return f.map_columns(act)
    if tuple(f.shape[:2]) != (kernel.outputs, kernel.columns):
        raise ArgumentError(
            f"the Jacobian has shape (c, n, d) {tuple(f.shape)}; expected ({kernel.outputs}, {kernel.columns}, d)"
        )
    return f.lazily(act, transposed or act, kernel.rows)
