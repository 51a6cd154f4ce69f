"""What Jacobians, their transposes, and all representations of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError, DeviceError
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector


class JacobianMap(ABC):
    """What a Jacobian and its transpose share: ``shape (c, n, d)``, dtype, device, the parameters."""

    expressions: ClassVar[dict[str, Callable[..., Any]]] = {}  # what J^T @ J' makes, a "product"

    if TYPE_CHECKING:  # a field of some, computed by others

        @property
        def layer_collection(self) -> LayerCollection:
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
        if isinstance(v, Mapping):
            v = PVector.from_dict(self.layer_collection, v)
        if not isinstance(v, PVector):
            raise ArgumentTypeError(
                f"the operand is {type(v).__name__}; expected a PVector (PVector.from_flat(J.layer_collection, "
                "tensor) makes one)"
            )
        self.layer_collection.require(v.layer_collection, "the vector")
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
