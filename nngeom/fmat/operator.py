"""Function-space operators: the contract, and what follows from few primitives.

An operator maps functions on ``m`` examples to functions on ``n`` examples, both with ``c`` outputs. Flattened rows are
output-major: row ``output * n + example``.
"""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, overload

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core import linalg
from nngeom.core.damping import Damping
from nngeom.core.errors import ArgumentError, ArgumentTypeError, DeviceError, SizeError, not_added
from nngeom.core.given_plainly import require_real
from nngeom.core.hand import InHand
from nngeom.fmat.columns import C, HasColumns, by_columns, has_columns
from nngeom.pmat.arguments import as_divisor
from nngeom.space.fvector import FVector

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

    from nngeom.fmat.dense import FMatDense

DENSE_LIMIT = 50_000


class FunctionOperator(InHand, ABC):
    """Anything that maps function space to function space; rectangular between two sets of examples.

    Primitives are ``outputs, rows, columns, dtype, device, product, T, scaled``, and what every kernel answers in a way
    of its own, from ``trace`` to ``to``; the rest has a definition in terms of them, overridden where the structure
    makes it cheap or exact.
    """

    expressions: ClassVar[dict[str, Callable[..., FunctionOperator]]] = {}  # what + and @ make where nothing is closed

    # -- primitives ----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def outputs(self) -> int:
        """``c``."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """``n``: examples that the result lives on."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """``m``: examples that the operand lives on."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """dtype of the entries."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the entries are."""

    @abstractmethod
    def product(self, f: Tensor) -> Tensor:
        """``K f``: ``f [*b, c, m] -> [*b, c, n]``."""

    @property
    @abstractmethod
    def T(self) -> FunctionOperator:
        """The transpose: a kernel between the two sets of examples the other way round."""

    @abstractmethod
    def scaled(self, c: float | Tensor) -> Self:
        """``c K``."""

    @abstractmethod
    def trace(self) -> Tensor:
        """``tr K``."""

    @abstractmethod
    def diag(self) -> FVector:
        """The diagonal, ``(c, n)``."""

    @abstractmethod
    def norm(self, kind: str | int = "fro") -> Tensor:
        """The Frobenius norm, ``kind="fro"``, or the largest singular value, ``kind=2``; others raise
        :class:`ArgumentError`.
        """

    @abstractmethod
    def solve(self, f: HasColumns[C], damping: float | Tensor | Damping = 0.0) -> C:
        """``(K + damping I)^-1 f``, batched, or of all columns of a ``PushForwardDense`` or a kernel."""

    @abstractmethod
    def inverse(self, damping: float | Tensor | Damping = 0.0) -> FunctionOperator:
        """``(K + damping I)^-1`` as a kernel."""

    @abstractmethod
    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """``log det(K + damping I)``."""

    @abstractmethod
    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``(c n,)``, ascending, and eigenvectors ``(c n, c n)``, columns in the same order."""

    @abstractmethod
    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Another dtype or device, as ``Tensor.to``."""

    # -- derived -------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """``(c n, c m)``."""
        return self.outputs * self.rows, self.outputs * self.columns

    def operand(self, f: Any, examples: int) -> Tensor:
        """The entries ``[*b, c, examples]`` of an FVector ``f``, checked, in the dtype of the kernel."""
        if not isinstance(f, FVector):
            raise ArgumentTypeError(
                f"the operand is {type(f).__name__}; expected an FVector (FVector(tensor) of shape (*batch, "
                f"{self.outputs}, {examples}))"
            )
        if tuple(f.shape[-2:]) != (self.outputs, examples):
            raise ArgumentError(
                f"the FVector has shape {tuple(f.shape)}; expected (*batch, {self.outputs}, {examples})"
            )
        if f.device != self.device:
            raise DeviceError(
                f"the FVector is on {f.device} and the matrix on {self.device}; move one with .to(device)"
            )
        return f.tensor.to(self.dtype)

    def _require_square(self, what: str) -> None:
        if self.rows != self.columns:
            raise ArgumentError(
                f"{what} needs a square kernel; this one is between {self.rows} and {self.columns} examples"
            )

    def mv(self, f: HasColumns[C]) -> C:
        """``K f``, batched: ``(*batch, c, m) -> (*batch, c, n)``; of a dense push-forward ``f`` all columns at once."""
        if has_columns(f):
            return cast(C, by_columns(self, f, self.mv, self.T.mv))
        return cast(C, FVector(self.product(self.operand(f, self.columns))))

    def vTMv(self, f: FVector) -> Tensor:
        """``f^T K f``, ``(*batch)``."""
        self._require_square("vTMv")
        x = self.operand(f, self.columns)
        return (x * self.product(x)).sum((-2, -1))

    def map_columns(self, f: Callable[[FVector], FVector]) -> FMatDense:
        """``f`` on all columns at once, as a kernel with all its entries."""
        columns = self.to_dense().T.reshape(-1, self.outputs, self.rows)
        return cast("FMatDense", self.expressions["columns"](f(FVector(columns)).tensor, self.columns))

    def to_dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """``(c n, c m)``, output-major; raises :class:`SizeError` where a side is above ``limit``."""
        if max(self.shape) > limit:
            size = self.shape[0] * self.shape[1] * self.dtype.itemsize / 2**30
            raise SizeError(
                f"the dense kernel {self.shape} takes {size:.1f} GiB; the limit is {limit} rows: pass "
                f"to_dense(limit={max(self.shape)}) to have it anyway"
            )
        return self._dense()

    def _dense(self) -> Tensor:
        eye = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        return self.product(eye.view(-1, self.outputs, self.columns)).flatten(1).T.contiguous()

    @overload
    def __matmul__(self, other: FunctionOperator) -> FMatDense: ...
    @overload
    def __matmul__(self, other: HasColumns[C]) -> C: ...
    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, FunctionOperator):
            if (other.outputs, other.rows) != (self.outputs, self.columns):
                raise ArgumentError(f"kernels of shapes {self.shape} and {other.shape} do not multiply")
            return self.expressions["product"](self, other)
        return self.mv(other)

    def __add__(self, other: FunctionOperator | Literal[0]) -> FunctionOperator:
        if isinstance(other, (int, float)) and other == 0:  # so that sum() works
            return self
        if not isinstance(other, FunctionOperator):
            raise not_added(other, "function-space")
        if (self.outputs, self.rows, self.columns) != (other.outputs, other.rows, other.columns):
            mine, theirs = ((k.outputs, k.rows, k.columns) for k in (self, other))
            raise ArgumentError(f"kernels of (outputs, rows, columns) {mine} and {theirs} do not add")
        return self.added(other)

    def __radd__(self, other: Any) -> FunctionOperator:
        return self.__add__(other)

    def added(self, other: FunctionOperator) -> FunctionOperator:
        """``K + other``, both of one shape: a lazy sum unless something closer is known."""
        return self.expressions["sum"](self, other)

    def __sub__(self, other: FunctionOperator) -> FunctionOperator:
        if not isinstance(other, FunctionOperator):
            raise not_added(other, "function-space")
        return self + (-1.0) * other

    def __neg__(self) -> Self:
        return -1.0 * self

    def __mul__(self, c: float | Tensor) -> Self:
        if not isinstance(c, numbers.Real) and not (isinstance(c, Tensor) and c.ndim == 0):
            raise ArgumentTypeError(f"cannot scale a kernel by {type(c).__name__}; expected a number")
        require_real(c, "the factor")
        return self.scaled(c if isinstance(c, Tensor) else float(c))

    __rmul__ = __mul__

    def __truediv__(self, c: float | Tensor) -> Self:
        return self * as_divisor(c)

    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` on flat numpy vectors."""
        from scipy.sparse.linalg import LinearOperator

        def act(k: FunctionOperator) -> Callable[[Any], Any]:
            def apply(x: Any) -> Any:
                t = torch.as_tensor(x.copy()).to(k.dtype).to(k.device)
                columns = t.reshape(k.shape[1], -1).T.reshape(-1, k.outputs, k.columns)
                out = k.product(columns).flatten(1).T
                return (out if t.ndim == 2 else out[:, 0]).detach().cpu().numpy()

            return apply

        forth, back = act(self), act(self.T)
        dtype = torch.empty((), dtype=linalg.accumulation_dtype(self.dtype)).numpy().dtype
        return LinearOperator(self.shape, matvec=forth, rmatvec=back, matmat=forth, rmatmat=back, dtype=dtype)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(outputs={self.outputs}, examples={self.rows}x{self.columns}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )
