"""The contract of parameter-space matrices, for anything that has products with vectors."""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.damping import Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, ArgumentTypeError, DeviceError, SizeError
from nngeom.core.linear import differentiated
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

DENSE_LIMIT = 20_000


class ParameterOperator(ABC):
    """Anything that maps parameter space to itself: the contract of section 3, tiers marked.

    Primitives are ``layer_collection, dtype, device, product, scaled``; every other operation has a definition in terms
    of them, overridden where the structure makes it cheap or exact.
    """

    expressions: ClassVar[dict[str, Callable[..., ParameterOperator]]] = {}  # what + and @ make where nothing is closed

    # -- primitives ----------------------------------------------------------------------------------------------------

    if TYPE_CHECKING:  # a field of some, computed by others

        @property
        def layer_collection(self) -> LayerCollection:
            """The parameters this matrix acts on."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """dtype of the entries."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the entries are."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """``M x``: ``x [*b, d] -> [*b, d]``."""

    def terms(self) -> list[tuple[float | Tensor, Callable[[Tensor], Tensor]]]:
        """The matrix as a sum of factors times maps ``[*b, d] -> [*b, d]``; iterative solves differentiate the
        factors.
        """
        return [(1.0, self.product)]

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Tensors outside of the matrix that its products depend on: the parameters of a model."""
        return ()

    # -- derived -------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """``(d, d)``."""
        return self.layer_collection.numel, self.layer_collection.numel

    def operand(self, v: Any) -> Tensor:
        """The entries ``[*b, d]`` of a PVector ``v``, checked, in the dtype of the matrix."""
        if not isinstance(v, PVector):
            raise ArgumentTypeError(
                f"the operand is {type(v).__name__}; expected a PVector (PVector.from_flat(M.layer_collection, "
                "tensor) makes one)"
            )
        self.layer_collection.require(v.layer_collection, "the vector")
        if v.device != self.device:
            raise DeviceError(f"the vector is on {v.device} and the matrix on {self.device}; move one with .to(device)")
        return v.flat().to(self.dtype)

    def _apply(self, f: Callable[[Tensor], Tensor], operand: Any) -> Any:
        """``f`` on a PVector, or on all rows of a dense push-forward at once."""
        if hasattr(operand, "map_rows"):
            return operand.map_rows(lambda v: PVector(self.layer_collection, f(self.operand(v))))
        return PVector(self.layer_collection, f(self.operand(operand)))

    def mv(self, v: Any) -> Any:
        """``M v`` for a PVector (batched), or for all rows of a ``PushForwardDense``."""
        return self._apply(self.product, v)

    def vTMv(self, v: Any) -> Tensor:
        """``v^T M v``, ``(*batch)``; for a push-forward ``v`` of every row, ``(c, n)``."""
        if hasattr(v, "forms"):
            self.layer_collection.require(v.layer_collection, "the push-forward")
            return v.forms(lambda x: self.vTMv(PVector(self.layer_collection, x)))
        x = self.operand(v)
        return (x * self.product(x)).sum(-1)

    def to_dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """``(d, d)`` in flat parameter order; raises :class:`SizeError` above ``limit`` parameters."""
        d = self.shape[0]
        if d > limit:
            size = d * d * self.dtype.itemsize / 2**30
            raise SizeError(
                f"the dense matrix of {d} parameters takes {size:.1f} GiB; the limit is {limit} parameters: pass "
                f"to_dense(limit={d}) to have it anyway"
            )
        return self._dense()

    def _dense(self) -> Tensor:
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return self.product(eye).T.contiguous()

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, ParameterOperator):
            return self.expressions["product"](self, other)
        return self.mv(other)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, (int, float)) and other == 0:
            return self
        if not isinstance(other, ParameterOperator):
            raise ArgumentTypeError(
                f"cannot add {type(other).__name__} to a parameter-space matrix; expected another one"
            )
        self.layer_collection.require(other.layer_collection, "the other matrix")
        closed = self.added(other)
        return self.expressions["sum"](self, other) if closed is None else closed

    def __radd__(self, other: Any) -> Any:
        return self.__add__(other)

    def added(self, other: ParameterOperator) -> ParameterOperator | None:
        """``M + other`` where it is of a kind that is known; ``None``: it becomes a lazy sum."""
        return None

    def __sub__(self, other: Any) -> Any:
        if not isinstance(other, ParameterOperator):
            raise ArgumentTypeError(
                f"cannot subtract {type(other).__name__} from a parameter-space matrix; expected another one"
            )
        return self + (-1.0) * other

    def __neg__(self) -> Any:
        return -1.0 * self

    @abstractmethod
    def scaled(self, c: float | Tensor) -> ParameterOperator:
        """``c M``; a tensor where it requires a gradient."""

    def __mul__(self, c: Any) -> Any:
        return self.scaled(as_factor(c))

    __rmul__ = __mul__

    def __truediv__(self, c: Any) -> Any:
        return self.scaled(1 / as_factor(c))

    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` on flat numpy vectors."""
        from scipy.sparse.linalg import LinearOperator

        def apply(x):
            t = torch.as_tensor(x.copy()).to(self.dtype).to(self.device)
            columns = t.reshape(self.shape[0], -1).T
            out = self.product(columns).T if t.ndim == 2 else self.product(columns)[0]
            return out.reshape(t.shape).detach().cpu().numpy()

        dtype = torch.empty((), dtype=linalg.accumulation_dtype(self.dtype)).numpy().dtype
        return LinearOperator(self.shape, matvec=apply, rmatvec=apply, matmat=apply, rmatmat=apply, dtype=dtype)


def as_factor(c: Any) -> float | Tensor:
    """A number ``c`` to scale by; a 0-d tensor stays one where it requires a gradient."""
    if not isinstance(c, numbers.Real) and not (isinstance(c, Tensor) and c.ndim == 0):
        given = type(c).__name__
        raise ArgumentTypeError(f"cannot scale a matrix by {given}; expected a number (M @ N is the product)")
    if not isinstance(c, Tensor):
        return float(c)
    return c if differentiated(c) else float(c.detach())


def require_tikhonov(damping: Any, what: str) -> Tikhonov:
    """A plain number as damping, checked."""
    d = as_damping(damping)
    if not isinstance(d, Tikhonov):
        raise ArgumentError(f"{what} takes a number as damping, got {damping!r}; expected a number >= 0")
    return d


def require_frobenius(kind: Any) -> None:
    """Only the Frobenius norm is offered."""
    if kind not in ("fro", None):
        raise ArgumentError(f"norm({kind!r}) is not offered; expected 'fro' (eigenvalues for other norms: M.eigh()[0])")
