"""From parameter space to function space: ``delta w -> J delta w``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError, DeviceError, UnsupportedError
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.implicit import FMatImplicit, push
from nngeom.fmat.tiles import Side, span
from nngeom.pmat.block import TensorObject
from nngeom.pmat.recipe import write_rows
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector

if TYPE_CHECKING:
    from nngeom.maps.pull_back import PullBackDense, PullBackImplicit


class JacobianMap(ABC):
    """What a Jacobian and its transpose share: ``shape (c, n, d)``, dtype, device, the parameters."""

    @property
    @abstractmethod
    def collection(self) -> LayerCollection:
        """The parameters."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """``(c, n, d)``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """dtype of the entries."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the entries are."""

    def _vector(self, v: Any) -> Tensor:
        if not isinstance(v, PVector):
            raise ArgumentTypeError(
                f"the operand is {type(v).__name__}; expected a PVector (PVector.from_flat(J.layer_collection, "
                "tensor) makes one)"
            )
        self.collection.require(v.layer_collection, "the vector")
        return self._here(v).flat().to(self.dtype)

    def _function(self, u: Any) -> Tensor:
        if not isinstance(u, FVector):
            raise ArgumentTypeError(
                f"the operand is {type(u).__name__}; expected an FVector (FVector(tensor) of shape (*batch, c, n))"
            )
        if tuple(u.shape[-2:]) != tuple(self.shape[:2]):
            raise ArgumentError(
                f"the FVector has shape {tuple(u.shape)}; expected (*batch, {self.shape[0]}, {self.shape[1]})"
            )
        return self._here(u).tensor.to(self.dtype)

    def _here(self, v: Any) -> Any:
        if v.device != self.device:
            raise DeviceError(f"the vector is on {v.device} and the map on {self.device}; move one with .to(device)")
        return v

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


@dataclass(frozen=True, eq=False, repr=False)
class DenseMap(JacobianMap, TensorObject):
    """A map that holds the Jacobian, ``tensor[k, n]`` the gradient of output ``k`` at example ``n``: ``(c, n, d)``."""

    layer_collection: LayerCollection
    tensor: Tensor  # [c n d]

    def __post_init__(self):
        d = self.layer_collection.numel
        if not isinstance(self.tensor, Tensor) or self.tensor.ndim != 3 or self.tensor.shape[-1] != d:
            given = tuple(self.tensor.shape) if isinstance(self.tensor, Tensor) else type(self.tensor).__name__
            raise ArgumentError(f"a {type(self).__name__} of this collection has shape (c, n, {d}); got {given}")

    @property
    def collection(self):
        return self.layer_collection

    @property
    def shape(self):
        return tuple(self.tensor.shape)

    @property
    def dtype(self):
        return self.tensor.dtype

    @property
    def device(self):
        return self.tensor.device

    def rows(self) -> Tensor:
        """``(c n, d)``."""
        return self.tensor.flatten(0, 1)


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitMap(JacobianMap):
    """A map known by its products; keeps the model and the batches, and is not picklable."""

    side: Side

    @property
    def collection(self):
        return self.side.run.task.collection

    @property
    def layer_collection(self):
        """The parameters."""
        return self.collection

    @property
    def shape(self):
        return self.side.outputs, self.side.examples, self.collection.numel

    @property
    def dtype(self):
        return self.side.dtype

    @property
    def device(self):
        return self.side.device

    def __reduce__(self):
        raise UnsupportedError("an implicit map holds a model and data, so it is not pickled; materialize() it first")


class PushForwardDense(DenseMap):
    """``J``, with all its entries, ``tensor (c, n, d)`` over ``layer_collection``."""

    def mv(self, v: PVector) -> FVector:
        """``J v``, batched: ``(*batch, d) -> (*batch, c, n)``."""
        return FVector((self._vector(v) @ self.rows().T).unflatten(-1, self.shape[:2]))

    def map_rows(self, f: Callable[[PVector], PVector]) -> PushForwardDense:
        """``f`` on all rows at once: ``M @ J`` and ``M.solve(J, damping)`` are maps with rows ``M J[k, n]``."""
        return PushForwardDense(self.layer_collection, f(PVector(self.layer_collection, self.tensor)).flat())

    @property
    def T(self) -> PullBackDense:
        """``J^T``."""
        from nngeom.maps.pull_back import PullBackDense

        return PullBackDense(self.layer_collection, self.tensor)

    def __matmul__(self, other: Any) -> Any:
        """``J v``, ``J J'^T`` (an FMatDense), or ``J M`` for a symmetric matrix over the parameters."""
        from nngeom.maps.pull_back import PullBackDense
        from nngeom.pmat.operator import ParameterOperator

        if isinstance(other, PullBackDense):
            self.collection.require(other.collection, "the pull-back")
            if other.shape[0] != self.shape[0]:
                raise ArgumentError(f"maps of {self.shape[0]} and {other.shape[0]} outputs do not make a kernel")
            return FMatDense((self.rows() @ other.rows().T.to(self.dtype)).view(*self.shape[:2], *other.shape[:2]))
        if isinstance(other, ParameterOperator):
            if not getattr(other, "symmetric", True):
                raise UnsupportedError("J @ M needs a symmetric M; a product of matrices is not")
            return other.mv(self)
        return self.mv(other)


class PushForwardImplicit(ImplicitMap):
    """``J``, by one forward-mode pass over the data of ``side`` a product."""

    def mv(self, v: PVector) -> FVector:
        """``J v``, batched: ``(*batch, d) -> (*batch, c, n)``."""
        return FVector(push(self.side, self._vector(v)))

    @property
    def T(self) -> PullBackImplicit:
        """``J^T``."""
        from nngeom.maps.pull_back import PullBackImplicit

        return PullBackImplicit(self.side)

    def __matmul__(self, other: Any) -> Any:
        """``J v``, or the implicit kernel ``J J'^T``."""
        from nngeom.maps.pull_back import PullBackImplicit

        if isinstance(other, PullBackImplicit):
            self.collection.require(other.collection, "the pull-back")
            return FMatImplicit(self.side, other.side)
        return self.mv(other)

    def materialize(self) -> PushForwardDense:
        """The same map with all its entries."""
        with self.side.within():
            return PushForwardDense(self.collection, dense_rows(self.side))


def dense_rows(side: Side) -> Tensor:
    """``(c, n, d)``: the gradients of all outputs at all examples."""
    out: Tensor | None = None
    d = side.run.task.collection.numel
    with torch.no_grad():
        for chunk in side.chunks(reuse=True):
            k, n = span(chunk)
            if out is None:
                out = torch.empty(chunk.outputs[1], side.examples, d, dtype=side.dtype, device=side.device)
            for layout, j in chunk.jacobians.items():
                write_rows(out[k, n], j, layout)
            written = {name for layout in chunk.jacobians for name in layout.names}
            for name, (lo, shape) in side.run.task.collection.offsets().items():
                if name not in written:  # parameters that the outputs do not depend on
                    out[k, n, lo : lo + torch.Size(shape).numel()] = 0
    return out if out is not None else torch.zeros(side.outputs, side.examples, d, dtype=side.dtype, device=side.device)
