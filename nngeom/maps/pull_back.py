"""From function space to parameter space: ``u -> J^T u``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.maps.push_forward import PushForwardDense
from nngeom.pmat.block import TensorObject
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector


@dataclass(frozen=True, eq=False, repr=False)
class PullBackDense(TensorObject):
    """``J^T``; holds the same ``tensor`` ``(c, n, d)`` as the push-forward it transposes."""

    layer_collection: LayerCollection
    tensor: Tensor  # [c n d]

    @property
    def shape(self):
        """``(c, n, d)``."""
        return self.tensor.shape

    @property
    def dtype(self):
        """dtype of the entries."""
        return self.tensor.dtype

    @property
    def device(self):
        """Where the entries are."""
        return self.tensor.device

    def mv(self, u: FVector) -> PVector:
        """``J^T u``, batched: ``(*batch, c, n) -> (*batch, d)``."""
        if not isinstance(u, FVector):
            raise ArgumentTypeError(f"the operand is {type(u).__name__}; expected an FVector")
        if u.shape[-2:] != self.shape[:2]:
            raise ArgumentError(f"the FVector has shape {tuple(u.shape)}; expected (*batch, {self.shape[0]}, {self.shape[1]})")
        return PVector(self.layer_collection, u.flat().to(self.dtype) @ self.tensor.flatten(0, 1))

    __matmul__ = mv

    @property
    def T(self) -> PushForwardDense:
        """``J``."""
        return PushForwardDense(self.layer_collection, self.tensor)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"
