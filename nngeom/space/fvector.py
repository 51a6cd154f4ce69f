"""Vectors of function space: one number an output and example."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.norms import vector_norm
from nngeom.space.operations import Elementwise, combined


@dataclass(frozen=True, eq=False)
class FVector(Elementwise):
    """A ``tensor (*batch, c, n)`` of outputs by examples; flattened output-major, row ``output * n + example``."""

    tensor: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor) or self.tensor.ndim < 2:
            given = tuple(self.tensor.shape) if isinstance(self.tensor, Tensor) else type(self.tensor).__name__
            raise ArgumentError(f"an FVector has shape (*batch, c, n); got {given}")

    def like(self, tensor: Tensor) -> FVector:
        """The vector of the entries ``tensor (*batch, c, n)``."""
        return FVector(tensor)

    def map_columns(self, f: Callable[[FVector], FVector]) -> FVector:
        """``f`` of the one column that this is."""
        return f(self)

    def flat(self) -> Tensor:
        """``(*batch, c * n)``."""
        return self.tensor.flatten(-2)

    @property
    def shape(self) -> torch.Size:
        """``(*batch, c, n)``."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the entries."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.tensor.device

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]

    def _with(self, other: Any, f: Callable[[Tensor, Any], Tensor]) -> FVector:
        if isinstance(other, FVector):
            if other.shape[-2:] != self.shape[-2:]:
                raise ArgumentError(f"FVectors of shapes {tuple(self.shape)} and {tuple(other.shape)} do not fit")
            return FVector(combined(f, self.tensor, other.tensor, 2))
        if isinstance(other, numbers.Real) or (isinstance(other, Tensor) and other.ndim == 0):
            return FVector(f(self.tensor, other))
        raise ArgumentTypeError(
            f"cannot combine an FVector with {type(other).__name__}; expected an FVector or a number"
        )

    def _same(self, other: Any, f: Callable[[Tensor, Any], Tensor]) -> FVector:
        if isinstance(other, (int, float)) and other == 0:  # so that sum() works
            return self
        if not isinstance(other, FVector):
            raise ArgumentTypeError(f"cannot add {type(other).__name__} to an FVector; expected an FVector")
        return self._with(other, f)

    def __add__(self, other: FVector | Literal[0]) -> FVector:
        return self._same(other, torch.add)

    def __radd__(self, other: Any) -> FVector:
        return self.__add__(other)

    def __sub__(self, other: FVector) -> FVector:
        return self._same(other, torch.sub)

    def __mul__(self, other: FVector | Tensor | float) -> FVector:
        return self._with(other, torch.mul)

    __rmul__ = __mul__

    def __truediv__(self, other: FVector | Tensor | float) -> FVector:
        return self._with(other, torch.div)

    def __neg__(self) -> FVector:
        return FVector(-self.tensor)

    def dot(self, other: FVector) -> Tensor:
        """Inner product with ``other``, ``(*batch)``."""
        if not isinstance(other, FVector):
            raise ArgumentTypeError(f"the other vector is {type(other).__name__}; expected an FVector")
        return self._with(other, torch.mul).tensor.sum((-2, -1))

    def norm(self, p: float = 2) -> Tensor:
        """The ``p``-norm of the whole vector, ``(*batch)``."""
        return vector_norm(self.flat(), p)

    def clone(self) -> FVector:
        """A copy."""
        return FVector(self.tensor.clone())

    def detach(self) -> FVector:
        """Without its graph."""
        return FVector(self.tensor.detach())

    def to(self, *args: Any, **kwargs: Any) -> FVector:
        """Another dtype or device, as ``Tensor.to``."""
        return FVector(self.tensor.to(*args, **kwargs))
