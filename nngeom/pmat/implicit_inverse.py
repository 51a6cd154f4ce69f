"""The inverse of an implicit matrix, itself known by its products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core.damping import Damping
from nngeom.pmat.expression import PMatExpression
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector

if TYPE_CHECKING:
    from nngeom.pmat.implicit import PMatImplicit


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitInverse(PMatExpression):
    """``(M + damping I)^-1`` of an implicit matrix: every product is a conjugate-gradient solve."""

    operator: PMatImplicit
    damping: Damping
    options: dict[str, Any]
    scale: float | Tensor = 1.0

    @property
    def layer_collection(self) -> LayerCollection:
        return self.operator.layer_collection

    @property
    def dtype(self) -> torch.dtype:
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        return self.operator.device

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.operator.held

    def product(self, x: Tensor) -> Tensor:
        result: Tensor = (
            self.scale * self.operator.solve(PVector(self.layer_collection, x), self.damping, **self.options).flat()
        )
        return result

    def scaled(self, c: float | Tensor) -> Self:
        return replace(self, scale=c * self.scale)

    def trace(self) -> Tensor:
        return self.to_dense().trace()

    def to(self, *args: Any, **kwargs: Any) -> ImplicitInverse:
        """Refused by the implicit matrix; raises :class:`UnsupportedError`."""
        return replace(self, operator=self.operator.to(*args, **kwargs))
