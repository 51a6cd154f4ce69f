"""A kernel times a Jacobian that is known by its products, ``K J``, and its transpose: lazy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nngeom.fmat.columns import Act
from nngeom.maps.dense import PullBackDense, PushForwardDense
from nngeom.maps.jacobian_map import JacobianMap
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector


class Push(Protocol):
    """A push-forward that is not made of entries."""

    @property
    def layer_collection(self) -> LayerCollection: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def mv(self, v: PVector) -> FVector: ...

    @property
    def T(self) -> Any: ...

    def materialize(self) -> PushForwardDense: ...

    def __getitem__(self, name: str) -> Tensor: ...

    def __matmul__(self, other: Any) -> Any: ...


@dataclass(frozen=True, eq=False, repr=False)
class MappedMap(JacobianMap):
    """``act(J v)`` for a linear map ``act`` of function space, to functions on so many ``examples``."""

    of: Push
    act: Act
    transposed: Act
    examples: int

    @property
    def layer_collection(self) -> LayerCollection:
        return self.of.layer_collection

    @property
    def shape(self) -> tuple[int, int, int]:
        c, _, d = self.of.shape
        return c, self.examples, d

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    @property
    def device(self) -> torch.device:
        return self.of.device

    def norm(self) -> Tensor:
        return self._entries().norm()

    def _entries(self) -> PushForwardDense:
        return self.of.materialize().map_columns(self.act)

    def __getitem__(self, name: str) -> Tensor:
        rows = self.of[name]
        columns = self.act(FVector(rows.flatten(2).movedim(-1, 0))).tensor.movedim(0, -1)
        return columns.reshape(*self.shape[:2], *rows.shape[2:])


class MappedPush(MappedMap):
    """``K J``, ``v -> K (J v)``."""

    pushes = True

    def mv(self, v: PVector) -> FVector:
        """``K J v``, batched: ``(*batch, d) -> (*batch, c, n)``."""
        return self.act(self.of.mv(v))

    @property
    def T(self) -> MappedPull:
        """``J^T K^T``."""
        return MappedPull(self.of, self.act, self.transposed, self.examples)

    def times(self, other: Any) -> Any:
        """The product with ``other``: ``K J v``, or the kernel ``K J J'^T`` with all its entries."""
        if isinstance(other, JacobianMap) and not other.pushes:
            return (self.of @ other).map_columns(self.act)
        return self.mv(other)

    def lazily(self, act: Act, transposed: Act, examples: int) -> MappedPush:
        """``act`` on all columns, with its transpose: functions on so many ``examples``."""
        return MappedPush(self, act, transposed, examples)

    def forms(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """A quadratic form ``f``, ``[r, d] -> [r]``, of all rows, ``(c, n)``."""
        return self._entries().forms(f)

    def materialize(self) -> PushForwardDense:
        """The same map with all its entries."""
        return self._entries()


class MappedPull(MappedMap):
    """``J^T K^T``, ``u -> J^T (K^T u)``."""

    pushes = False

    def mv(self, u: FVector) -> PVector:
        """``J^T K^T u``, batched: ``(*batch, c, n) -> (*batch, d)``."""
        pulled: PVector = self.of.T.mv(self.transposed(FVector(self._function(u))))
        return pulled

    @property
    def T(self) -> MappedPush:
        """``K J``."""
        return MappedPush(self.of, self.act, self.transposed, self.examples)

    def after(self, other: JacobianMap) -> Any:
        """The kernel ``J' (K J)^T`` of another map ``other``, with all its entries."""
        if not other.pushes:
            return super().after(other)
        return (self.of @ other.T).map_columns(self.act).T  # type: ignore[attr-defined]

    def times(self, other: Any) -> Any:
        """The product with ``other``: ``J^T K^T u``, or the matrix ``J^T K^T J'`` over the parameters (lazy, of all
        entries).
        """
        if isinstance(other, JacobianMap) and other.pushes:
            return self.materialize().times(other)
        return self.mv(other)

    def materialize(self) -> PullBackDense:
        """The same map with all its entries."""
        return self._entries().T


JacobianMap.expressions.update(mapped=MappedPush)
