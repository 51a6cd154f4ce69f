"""Jacobians with all their entries: ``delta w -> J delta w``, and the transpose ``u -> J^T u``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core import memory
from nngeom.core.errors import ArgumentError, UnsupportedError
from nngeom.fmat.dense import FMatDense
from nngeom.maps.jacobian_map import JacobianMap
from nngeom.maps.rows import ExplicitRows
from nngeom.pmat.block import TensorObject
from nngeom.pmat.drive import Source
from nngeom.pmat.operator import ParameterOperator
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector

if TYPE_CHECKING:
    from nngeom.maps.product import PMatPullPush


@dataclass(frozen=True, eq=False, repr=False)
class DenseMap(TensorObject, JacobianMap):
    """A map that holds the Jacobian, ``tensor[k, n]`` the gradient of output ``k`` at example ``n``: ``(c, n, d)``."""

    layer_collection: LayerCollection
    tensor: Tensor  # [c n d]

    def __post_init__(self) -> None:
        d = self.layer_collection.numel
        if not isinstance(self.tensor, Tensor) or self.tensor.ndim != 3 or self.tensor.shape[-1] != d:
            given = tuple(self.tensor.shape) if isinstance(self.tensor, Tensor) else type(self.tensor).__name__
            raise ArgumentError(f"a {type(self).__name__} of this collection has shape (c, n, {d}); got {given}")

    @property
    def shape(self) -> tuple[int, int, int]:
        c, n, d = self.tensor.shape
        return c, n, d

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def added(self, other: JacobianMap) -> JacobianMap:
        if not isinstance(other, DenseMap) or type(other) is not type(self):
            return super().added(other)
        return type(self)(self.layer_collection, self.tensor + other.tensor)

    def scaled(self, c: float | Tensor) -> Self:
        return type(self)(self.layer_collection, c * self.tensor)

    def norm(self) -> Tensor:
        return self.tensor.norm()

    @property
    def origin(self) -> Tensor:
        return self.tensor

    def dot(self, other: Any) -> Tensor:
        return (self.tensor * other.tensor).sum()

    def source(self, passes: int) -> Source:
        return ExplicitRows(self.tensor, self.layer_collection)

    def materialize(self) -> Self:
        """Itself."""
        return self

    def __getitem__(self, name: str) -> Tensor:
        place, shape = self.place(name)
        return self.tensor[..., place].unflatten(-1, shape) if shape else self.tensor[..., place].squeeze(-1)

    def rows(self) -> Tensor:
        """``(c n, d)``."""
        return self.tensor.flatten(0, 1)


class PushForwardDense(DenseMap):
    """``J``, with all its entries, ``tensor (c, n, d)`` over ``layer_collection``."""

    pushes = True

    def mv(self, v: PVector) -> FVector:
        """``J v``, batched: ``(*batch, d) -> (*batch, c, n)``."""
        return FVector((self._vector(v) @ self.rows().T).unflatten(-1, self.shape[:2]))

    def map_rows(self, f: Callable[[PVector], PVector]) -> PushForwardDense:
        """``f`` on all rows at once: ``M @ J`` and ``M.solve(J, damping)`` are maps with rows ``M J[k, n]``."""
        return PushForwardDense(self.layer_collection, f(PVector(self.layer_collection, self.tensor)).flat())

    def map_columns(self, f: Callable[[FVector], FVector]) -> PushForwardDense:
        """``f`` on all columns at once: ``K @ J`` and ``K.solve(J, damping)`` are maps with columns ``K J[..., d]``."""
        columns = f(FVector(self.tensor.movedim(-1, 0))).tensor
        return PushForwardDense(self.layer_collection, columns.movedim(0, -1))

    def forms(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """A quadratic form ``f``, ``[r, d] -> [r]``, of all rows, ``(c, n)``."""
        rows = self.rows()
        cuts = memory.pieces(len(rows), 4 * rows.shape[-1] * rows.element_size())
        return torch.cat([f(rows[lo:hi]) for lo, hi in cuts]).view(self.shape[:2])

    @property
    def T(self) -> PullBackDense:
        """``J^T``."""
        return PullBackDense(self.layer_collection, self.tensor)

    @overload
    def __matmul__(self, other: PVector) -> FVector: ...
    @overload
    def __matmul__(self, other: PullBackDense) -> FMatDense: ...
    @overload
    def __matmul__(self, other: ParameterOperator) -> PushForwardDense: ...
    def __matmul__(self, other: Any) -> Any:
        return super().__matmul__(other)

    def times(self, other: Any) -> Any:
        """The product with ``other``: ``J v``, ``J J'^T`` (an FMatDense), or ``J M`` for a symmetric ``M``."""
        if isinstance(other, JacobianMap) and not other.pushes:
            other = other.materialize()
            self.layer_collection.require(other.layer_collection, "the pull-back")
            if other.shape[0] != self.shape[0]:
                raise ArgumentError(f"maps of {self.shape[0]} and {other.shape[0]} outputs do not make a kernel")
            return FMatDense((self.rows() @ other.rows().T.to(self.dtype)).view(*self.shape[:2], *other.shape[:2]))
        if isinstance(other, ParameterOperator):
            if not getattr(other, "symmetric", True):
                raise UnsupportedError("J @ M needs a symmetric M; a product of matrices is not")
            return other.mv(self)
        return self.mv(other)


class PullBackDense(DenseMap):
    """``J^T``; holds the same ``tensor`` ``(c, n, d)`` as the push-forward it transposes, over ``layer_collection``."""

    pushes = False

    def mv(self, u: FVector) -> PVector:
        """``J^T u``, batched: ``(*batch, c, n) -> (*batch, d)``."""
        return PVector(self.layer_collection, self._function(u).flatten(-2) @ self.rows())

    @property
    def T(self) -> PushForwardDense:
        """``J``."""
        return PushForwardDense(self.layer_collection, self.tensor)

    @overload
    def __matmul__(self, other: FVector) -> PVector: ...
    @overload
    def __matmul__(self, other: PushForwardDense) -> PMatPullPush: ...
    def __matmul__(self, other: Any) -> Any:
        return super().__matmul__(other)

    def times(self, other: Any) -> Any:
        """The product with ``other``: ``J^T u``, or the matrix ``J^T J'`` over the parameters (lazy)."""
        pushes = isinstance(other, JacobianMap) and other.pushes
        return self.expressions["product"](self, other.materialize()) if pushes else self.mv(other)
