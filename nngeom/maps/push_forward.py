"""From parameter space to function space: ``delta w -> J delta w``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.fmat.dense import FMatDense
from nngeom.pmat.block import TensorObject
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector

if TYPE_CHECKING:
    from nngeom.maps.pull_back import PullBackDense


@dataclass(frozen=True, eq=False, repr=False)
class PushForwardDense(TensorObject):
    """The Jacobian itself: ``tensor[k, n]`` is the gradient of output ``k`` at example ``n``, ``(c, n, d)``."""

    layer_collection: LayerCollection
    tensor: Tensor  # [c n d]

    def __post_init__(self):
        d = self.layer_collection.numel
        if self.tensor.ndim != 3 or self.tensor.shape[-1] != d:
            raise ArgumentError(f"a PushForwardDense of this collection has shape (c, n, {d}); got {tuple(self.tensor.shape)}")

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

    def mv(self, v: PVector) -> FVector:
        """``J v``, batched: ``(*batch, d) -> (*batch, c, n)``."""
        if not isinstance(v, PVector):
            raise ArgumentTypeError(f"the operand is {type(v).__name__}; expected a PVector")
        self.layer_collection.require(v.layer_collection, "the vector")
        flat = v.flat().to(self.dtype)
        return FVector((flat @ self.tensor.flatten(0, 1).T).unflatten(-1, self.shape[:2]))

    def map_rows(self, f: Callable[[PVector], PVector]) -> PushForwardDense:
        """``f`` on every row: ``M @ J`` is the Jacobian with rows ``M J[k, n]``."""
        return PushForwardDense(self.layer_collection, f(PVector(self.layer_collection, self.tensor)).flat())

    @property
    def T(self) -> PullBackDense:
        """``J^T``."""
        from nngeom.maps.pull_back import PullBackDense

        return PullBackDense(self.layer_collection, self.tensor)

    def __matmul__(self, other: Any) -> Any:
        from nngeom.maps.pull_back import PullBackDense

        if isinstance(other, PullBackDense):
            self.layer_collection.require(other.layer_collection, "the pull-back")
            k = self.tensor.flatten(0, 1) @ other.tensor.flatten(0, 1).T
            return FMatDense(k.view(*self.shape[:2], *other.shape[:2]))
        return self.mv(other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"
