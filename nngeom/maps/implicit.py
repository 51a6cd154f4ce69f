"""Jacobians known by their products: nothing stored but the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from nngeom.core.errors import UnsupportedError
from nngeom.fmat.chunks import span
from nngeom.fmat.columns import Act
from nngeom.fmat.implicit import FMatImplicit
from nngeom.fmat.jacobian_products import pull, push
from nngeom.fmat.products import EVERYTHING, squared_norms
from nngeom.fmat.side import Side
from nngeom.maps.dense import PullBackDense, PushForwardDense
from nngeom.maps.jacobian_map import JacobianMap
from nngeom.pmat.drive import Repeated, Source
from nngeom.pmat.recipe import write_rows
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector

if TYPE_CHECKING:
    from nngeom.maps.product import PMatPullPush


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitMap(JacobianMap):
    """A map known by its products; keeps the model and the batches, and is not picklable."""

    side: Side

    @property
    def layer_collection(self) -> LayerCollection:
        return self.side.run.network.collection

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.side.outputs, self.side.everywhere, self.layer_collection.numel

    @property
    def dtype(self) -> torch.dtype:
        return self.side.dtype

    @property
    def device(self) -> torch.device:
        return self.side.device

    def norm(self) -> Tensor:
        with torch.no_grad():
            return self.dot(self).sqrt()

    @property
    def origin(self) -> Side:
        return self.side

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.side.parameters

    def within(self) -> AbstractContextManager[Any]:
        return self.side.within()

    def dot(self, other: Any) -> Tensor:
        if other.side is self.side:
            with self.within():
                return squares(self.side)
        parts = [(self[name] * other[name]).sum() for name in self.layer_collection.names]
        return torch.stack(parts).sum()

    def source(self, passes: int) -> Source:
        return Repeated(self.side.sweep, passes)

    def __getitem__(self, name: str) -> Tensor:
        place, shape = self.place(name)
        out = self._zeros(math.prod(shape))
        with self.side.run.team.together("rows"):
            for k, n, rows in row_pieces(self.side):
                out[k, n] = rows[..., place]
        return self.side.whole(out).view(*self.shape[:2], *shape)

    def _zeros(self, *shape: int) -> Tensor:
        """``(c, n, *shape)`` of this process's examples."""
        side = self.side
        return torch.zeros(side.outputs, side.examples, *shape, dtype=self.dtype, device=self.device)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered; raises :class:`UnsupportedError`."""
        raise UnsupportedError(
            "an implicit map follows its model; move the model with model.to(...) and build it again, or materialize()"
        )

    def __reduce__(self) -> Any:
        raise UnsupportedError("an implicit map holds a model and data, so it is not pickled; materialize() it first")


class PushForwardImplicit(ImplicitMap):
    """``J``, by one forward-mode pass over the data of ``side`` a product."""

    pushes = True

    def mv(self, v: PVector) -> FVector:
        """``J v``, batched: ``(*batch, d) -> (*batch, c, n)``."""
        return FVector(push(self.side, self._vector(v)))

    @property
    def T(self) -> PullBackImplicit:
        """``J^T``."""
        return PullBackImplicit(self.side)

    @overload
    def __matmul__(self, other: PVector) -> FVector: ...
    @overload
    def __matmul__(self, other: PullBackImplicit) -> FMatImplicit: ...
    def __matmul__(self, other: Any) -> Any:
        return super().__matmul__(other)

    def times(self, other: Any) -> Any:
        """The product with ``other``: ``J v``, or the implicit kernel ``J J'^T``."""
        if isinstance(other, PullBackImplicit):
            self.layer_collection.require(other.layer_collection, "the pull-back")
            return FMatImplicit(self.side, other.side)
        if isinstance(other, JacobianMap) and not other.pushes:
            return self.materialize().times(other)
        return self.mv(other)

    def lazily(self, act: Act, transposed: Act, examples: int) -> Any:
        """A linear map ``act`` of function space, with its transpose ``transposed``, on all columns: functions on so
        many ``examples``, lazy.
        """
        return self.expressions["mapped"](self, act, transposed, examples)

    def forms(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """A quadratic form ``f``, ``[r, d] -> [r]``, of all rows, ``(c, n)``; rows are made in pieces."""
        out = self._zeros()
        with self.side.run.team.together("rows"):
            for k, n, rows in row_pieces(self.side):
                out[k, n] = f(rows.flatten(0, 1)).view(rows.shape[:2]).to(out)
        return self.side.whole(out)

    def materialize(self) -> PushForwardDense:
        """The same map with all its entries."""
        with self.side.within():
            return PushForwardDense(self.layer_collection, dense_rows(self.side))


class PullBackImplicit(ImplicitMap):
    """``J^T``, by one forward and one backward pass over the data of ``side`` a product."""

    pushes = False

    def mv(self, u: FVector) -> PVector:
        """``J^T u``, batched: ``(*batch, c, n) -> (*batch, d)``."""
        return PVector(self.layer_collection, pull(self.side, self._function(u)))

    @property
    def T(self) -> PushForwardImplicit:
        """``J``."""
        return PushForwardImplicit(self.side)

    @overload
    def __matmul__(self, other: FVector) -> PVector: ...
    @overload
    def __matmul__(self, other: PushForwardImplicit) -> PMatPullPush: ...
    def __matmul__(self, other: Any) -> Any:
        return super().__matmul__(other)

    def times(self, other: Any) -> Any:
        """The product with ``other``: ``J^T u``, or the matrix ``J^T J`` over the parameters (lazy)."""
        if isinstance(other, PushForwardImplicit):
            return self.expressions["product"](self, other)
        if isinstance(other, JacobianMap) and other.pushes:
            return self.materialize().times(other)
        return self.mv(other)

    def materialize(self) -> PullBackDense:
        """The same map with all its entries."""
        return self.T.materialize().T


def row_pieces(side: Side) -> Iterator[tuple[slice, slice, Tensor]]:
    """Outputs, examples and their rows ``(c', n', d)``, piece by piece; parameters that are not used have zeros."""
    d = side.run.network.collection.numel
    with torch.no_grad(), side.within():
        for chunk in side.chunks(reuse=True):
            k, n = span(chunk)
            rows = torch.zeros(k.stop - k.start, n.stop - n.start, d, dtype=side.dtype, device=side.device)
            for layout, j in chunk.jacobians.items():
                write_rows(rows, j, layout)
            yield k, n, rows


def squares(side: Side) -> Tensor:
    """The squared norms of all rows, added up."""
    team = side.run.team
    with team.together("rows"):
        total = torch.zeros((), dtype=side.dtype, device=side.device)
        total += squared_norms(side, EVERYTHING)[""].sum() if side.sizes else 0
    team.sum_([total])
    return total


def dense_rows(side: Side) -> Tensor:
    """``(c, n, d)``: the gradients of all outputs at all examples."""
    return side.whole(own_rows(side))


def own_rows(side: Side) -> Tensor:
    """Those of this process's examples."""
    with side.run.team.together("rows"):
        return _own_rows(side)


def _own_rows(side: Side) -> Tensor:
    out: Tensor | None = None
    d = side.run.network.collection.numel
    with torch.no_grad():
        for chunk in side.chunks(reuse=True):
            k, n = span(chunk)
            if out is None:
                out = torch.empty(chunk.cotangents[1], side.examples, d, dtype=side.dtype, device=side.device)
            for layout, j in chunk.jacobians.items():
                write_rows(out[k, n], j, layout)
            written = {name for layout in chunk.jacobians for name in layout.names}
            for name, (lo, shape) in side.run.network.collection.offsets().items():
                if name not in written:  # parameters that the outputs do not depend on
                    out[k, n, lo : lo + torch.Size(shape).numel()] = 0
    return out if out is not None else torch.zeros(side.outputs, side.examples, d, dtype=side.dtype, device=side.device)
