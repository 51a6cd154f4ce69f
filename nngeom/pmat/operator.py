"""The contract of parameter-space matrices, for anything that has products with vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, overload

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core import linalg
from nngeom.core.damping import Damping
from nngeom.core.errors import ArgumentTypeError, DeviceError, SizeError, not_added
from nngeom.core.hand import InHand
from nngeom.pmat.arguments import as_divisor, as_factor
from nngeom.pmat.operands import HasForms, V
from nngeom.pmat.spectra import Spectra
from nngeom.pmat.unoffered import Unoffered
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

    from nngeom.pmat.basis import Basis

DENSE_LIMIT = 20_000


class ParameterOperator(InHand, Spectra, Unoffered, ABC):
    """Anything that maps parameter space to itself: the contract of section 3, tiers marked.

    Primitives are ``layer_collection, dtype, device, product, scaled``, and what every matrix answers in a way of its
    own, from ``trace`` to ``to``; other operations have a definition in terms of them, overridden where the structure
    makes it cheap or exact.
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

    @abstractmethod
    def scaled(self, c: float | Tensor) -> Self:
        """``c M``; a tensor where it requires a gradient."""

    @abstractmethod
    def trace(self) -> Tensor:
        """``tr M``."""

    @abstractmethod
    def diag(self) -> PVector:
        """The diagonal."""

    @abstractmethod
    def norm(self, kind: str = "fro") -> Tensor:
        """The Frobenius norm; others than ``kind="fro"`` raise :class:`ArgumentError`."""

    @abstractmethod
    def solve(self, b: V, damping: float | Tensor | Damping = 0.0, *, indefinite: bool = False) -> V:
        """``(M + damping I)^-1 b`` for a PVector (batched) or all rows of a ``PushForwardDense``; ``indefinite``: with
        negative eigenvalues too.
        """

    @abstractmethod
    def inverse(self, damping: float | Tensor | Damping = 0.0, *, indefinite: bool = False) -> ParameterOperator:
        """``(M + damping I)^-1`` as a matrix; ``indefinite``: with negative eigenvalues too."""

    @abstractmethod
    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """``log det(M + damping I)``."""

    @abstractmethod
    def eigh(self) -> tuple[Tensor, Basis]:
        """Eigenvalues ``(d,)``, ascending, and an orthonormal basis in the same order."""

    @abstractmethod
    def sample(self, n: int, damping: float | Tensor = 0.0, generator: torch.Generator | None = None) -> PVector:
        """``n`` draws of ``N(0, (M + damping I)^-1)``; ``generator``: torch's global one by default."""

    @abstractmethod
    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Another dtype or device, as ``Tensor.to``."""

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
    def T(self) -> ParameterOperator:
        """The transpose: the matrix itself, which is symmetric."""
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """``(d, d)``."""
        return self.layer_collection.numel, self.layer_collection.numel

    def operand(self, v: Any) -> Tensor:
        """The entries ``[*b, d]`` of a PVector or dict of named tensors ``v``, checked, in the dtype of the matrix."""
        if isinstance(v, Mapping):
            v = PVector.from_dict(self.layer_collection, v)
        if not isinstance(v, PVector):
            raise ArgumentTypeError(
                f"the operand is {type(v).__name__}; expected a PVector (PVector.from_flat(M.layer_collection, "
                "tensor) makes one) or a dict of one tensor a parameter"
            )
        self.layer_collection.require(v.layer_collection, "the vector")
        if v.device != self.device:
            raise DeviceError(f"the vector is on {v.device} and the matrix on {self.device}; move one with .to(device)")
        return v.flat().to(self.dtype)

    def _apply(self, f: Callable[[Tensor], Tensor], operand: V) -> V:
        """``f`` on a PVector, or on all rows of a dense push-forward at once."""
        on_rows = getattr(operand, "map_rows", None)
        if on_rows is not None:
            return cast(V, on_rows(lambda v: PVector(self.layer_collection, f(self.operand(v)))))
        return cast(V, PVector(self.layer_collection, f(self.operand(operand))))

    def mv(self, v: V) -> V:
        """``M v`` for a PVector (batched), or for all rows of a ``PushForwardDense``."""
        return self._apply(self.product, v)

    def vTMv(self, v: PVector | HasForms) -> Tensor:
        """``v^T M v``, ``(*batch)``; for a push-forward ``v`` of every row, ``(c, n)``."""
        if not isinstance(v, PVector) and hasattr(v, "forms"):
            self.layer_collection.require(v.layer_collection, "the push-forward")
            return v.forms(lambda x: self.vTMv(PVector(self.layer_collection, x)))
        x = self.operand(v)
        return (x * self.product(x)).sum(-1)

    def to_dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """``(d, d)`` in flat parameter order; raises :class:`SizeError` above ``limit`` parameters."""
        self._require_room(limit)
        return self._dense()

    def _require_room(self, limit: int) -> None:
        """Raise :class:`SizeError` above ``limit`` parameters."""
        d = self.shape[0]
        if d > limit:
            size = d * d * self.dtype.itemsize / 2**30
            raise SizeError(
                f"the dense matrix of {d} parameters takes {size:.1f} GiB; the limit is {limit} parameters: pass "
                f"to_dense(limit={d}) to have it anyway"
            )

    def _dense(self) -> Tensor:
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return self.product(eye).T.contiguous()

    @overload
    def __matmul__(self, other: ParameterOperator) -> ParameterOperator: ...
    @overload
    def __matmul__(self, other: V) -> V: ...
    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, ParameterOperator):
            return self.expressions["product"](self, other)
        return self.mv(other)

    def __add__(self, other: ParameterOperator | Literal[0]) -> ParameterOperator:
        if isinstance(other, (int, float)) and other == 0:  # so that sum() works
            return self
        if not isinstance(other, ParameterOperator):
            raise not_added(other, "parameter-space")
        self.layer_collection.require(other.layer_collection, "the other matrix")
        closed = self.added(other)
        return self.expressions["sum"](self, other) if closed is None else closed

    def __radd__(self, other: Any) -> ParameterOperator:
        return self.__add__(other)

    def added(self, other: ParameterOperator) -> ParameterOperator | None:
        """``M + other`` where it is of a kind that is known; ``None``: it becomes a lazy sum."""
        return None

    def __sub__(self, other: ParameterOperator) -> ParameterOperator:
        if not isinstance(other, ParameterOperator):
            raise not_added(other, "parameter-space")
        return self + (-1.0) * other

    def __neg__(self) -> Self:
        return -1.0 * self

    def __mul__(self, c: float | Tensor) -> Self:
        return self.scaled(as_factor(c))

    __rmul__ = __mul__

    def __truediv__(self, c: float | Tensor) -> Self:
        return self.scaled(as_divisor(c))

    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` on flat numpy vectors."""
        from scipy.sparse.linalg import LinearOperator

        def apply(x: Any) -> Any:
            t = torch.as_tensor(x.copy()).to(self.dtype).to(self.device)
            columns = t.reshape(self.shape[0], -1).T
            out = self.product(columns).T if t.ndim == 2 else self.product(columns)[0]
            return out.reshape(t.shape).detach().cpu().numpy()

        dtype = torch.empty((), dtype=linalg.accumulation_dtype(self.dtype)).numpy().dtype
        return LinearOperator(self.shape, matvec=apply, rmatvec=apply, matmat=apply, rmatmat=apply, dtype=dtype)
