"""What Jacobians, their transposes, and all representations of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError, CollectionError, DeviceError, UnsupportedError
from nngeom.core.hand import InHand
from nngeom.pmat.arguments import as_divisor, as_factor
from nngeom.pmat.drive import Source
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector


class JacobianMap(InHand, ABC):
    """What a Jacobian and its transpose share: ``shape (c, n, d)``, dtype, device, the parameters."""

    expressions: ClassVar[dict[str, Callable[..., Any]]] = {}  # what + and J^T @ J' make, "sum" and "product"

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

    pushes: ClassVar[bool]  # J, and not its transpose

    @abstractmethod
    def mv(self, v: Any) -> Any:
        """The product with a vector ``v``, batched."""

    @abstractmethod
    def norm(self) -> Tensor:
        """The Frobenius norm."""

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor:
        """The derivatives in one parameter, ``(c, n, *its shape)``."""

    @abstractmethod
    def materialize(self) -> Any:
        """The same map with all its entries."""

    # -- what the product J^T J' asks of both --------------------------------------------------------------------------

    @property
    def origin(self) -> Any:
        """What holds the numbers: one and the same for a map and its transpose."""
        raise self._no_factor()

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Tensors that the map is a function of, other than its entries."""
        return ()

    def within(self) -> AbstractContextManager[Any]:
        """Work under the budget of its data."""
        return nullcontext()

    def dot(self, other: Any) -> Tensor:
        """The sum of the products of the entries of this map and of ``other``, of the same kind or its transpose."""
        raise self._no_factor()

    def source(self, passes: int) -> Source:
        """Its rows, as what a matrix is built from in so many ``passes``."""
        raise self._no_factor()

    def _no_factor(self) -> UnsupportedError:
        return UnsupportedError(f"a {type(self).__name__} is no factor of J^T J'; materialize() it first")

    # -- algebra -------------------------------------------------------------------------------------------------------

    def times(self, other: Any) -> Any:
        """The product with a vector, a map or a matrix ``other``."""
        return self.mv(other)

    def after(self, other: JacobianMap) -> Any:
        """The product of another map ``other`` with this one, ``other @ self``."""
        return other.times(self)

    def summands(self) -> list[tuple[float | Tensor, JacobianMap]]:
        """Factors and maps that this is the sum of."""
        return [(1.0, self)]

    def __matmul__(self, other: Any) -> Any:
        if not isinstance(other, JacobianMap):
            return self.times(other)
        pairs = [(w * v, x, y) for w, x in self.summands() for v, y in other.summands()]
        products = [y.after(x) if isinstance(c, float) and c == 1 else c * y.after(x) for c, x, y in pairs]
        return sum(products[1:], products[0])

    def added(self, other: JacobianMap) -> JacobianMap:
        """``J + other``, both of one shape: lazy unless entries are at hand."""
        return self.expressions["sum"]([*self.summands(), *other.summands()])

    def scaled(self, c: float | Tensor) -> JacobianMap:
        """``c J``."""
        return self.expressions["sum"]([(c * w, x) for w, x in self.summands()])

    def __add__(self, other: Any) -> Any:
        if isinstance(other, (int, float)) and other == 0:  # so that sum() works
            return self
        if not isinstance(other, JacobianMap) or other.pushes != self.pushes:
            what = "a push-forward" if self.pushes else "a pull-back"
            raise ArgumentTypeError(f"cannot add {type(other).__name__} to {what}; expected another one")
        self.layer_collection.require(other.layer_collection, "the other map")
        if tuple(self.shape) != tuple(other.shape):
            raise ArgumentError(f"maps of shapes (c, n, d) {tuple(self.shape)} and {tuple(other.shape)} do not add")
        return self.added(other)

    __radd__ = __add__

    def __neg__(self) -> Any:
        return self.scaled(-1.0)

    def __sub__(self, other: Any) -> Any:
        return self + (-other if isinstance(other, JacobianMap) else other)

    def __mul__(self, c: Any) -> Any:
        return self.scaled(as_factor(c))

    __rmul__ = __mul__

    def __truediv__(self, c: Any) -> Any:
        return self.scaled(as_divisor(c))

    # -- operands ------------------------------------------------------------------------------------------------------

    def place(self, name: str) -> tuple[slice, tuple[int, ...]]:
        """Where the parameter ``name`` lies in a row, and its shape."""
        table = self.layer_collection.offsets()
        if not isinstance(name, str) or name not in table:
            raise CollectionError(f"no parameter {name!r} in this map; it has {list(table)[:8]}")
        lo, shape = table[name]
        return slice(lo, lo + math.prod(shape)), shape

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
