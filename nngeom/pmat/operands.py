"""What a matrix is multiplied with besides vectors: the rows of a push-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor
from typing_extensions import Self

from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector


class Rows(Protocol):
    """Vectors of parameters that are the rows of something, as of a ``PushForwardDense``."""

    def map_rows(self, f: Callable[[PVector], PVector]) -> Self:
        """The same of the rows ``f`` makes of these, all at once."""


class HasForms(Protocol):
    """What has a quadratic form of each of its rows: a push-forward."""

    @property
    def layer_collection(self) -> LayerCollection:
        """The parameters."""

    def forms(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """A quadratic form ``f``, ``[r, d] -> [r]``, of all rows, ``(c, n)``."""


V = TypeVar("V", bound="PVector | Rows")
