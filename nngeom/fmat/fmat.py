"""Kernels that hold their entries: what all representations share. Gram matrices are not normalised, ``K = J J^T``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core import linalg
from nngeom.core.damping import Cutoff, Damping, Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, SingularError
from nngeom.core.registry import Registry
from nngeom.fmat.columns import C, HasColumns, by_columns, has_columns
from nngeom.fmat.operator import FunctionOperator
from nngeom.pmat.arguments import is_spectral
from nngeom.pmat.block import TensorObject
from nngeom.pmat.eigenvalues import log_sum, reciprocal, zero_small
from nngeom.solve.norm import largest_singular_value
from nngeom.space.fvector import FVector


@dataclass(frozen=True, eq=False, repr=False)
class FMat(TensorObject, FunctionOperator):
    """A kernel that holds its entries: frozen, one field ``tensor``. Representations differ in the shape of it.

    Primitives besides those of the operator: ``_symmetric_parts``, the matrices ``[parts, p, p]`` it is block diagonal
    in, from which factorisations follow.
    """

    tensor: Tensor

    kinds: ClassVar[Registry[type[FMat]]] = Registry()  # by qualified name, for files
    wider: ClassVar[type[FMat] | None] = None  # the next representation, which holds kernels of this one as well

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        FMat.kinds.add(cls)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def scaled(self, c: float | Tensor) -> Self:
        return self.map_tensors(lambda t: c * t)

    def widened(self) -> FMat:
        """The same kernel in the next wider representation; itself where there is none."""
        return self

    def added(self, other: FunctionOperator) -> FunctionOperator:
        """``K + other`` in the narrowest representation that holds both, where there is one."""
        if self.wider is None or not isinstance(other, FMat):
            return super().added(other)
        kind = _common(type(self), type(other))
        return super().added(other) if kind is None else kind(self._entries_as(kind) + other._entries_as(kind))

    def _entries_as(self, kind: type[FMat]) -> Tensor:
        """The entries in a wider representation."""
        return self.tensor if isinstance(self, kind) else self.widened()._entries_as(kind)

    def norm(self, kind: str | int = "fro") -> Tensor:
        """The Frobenius norm, ``kind="fro"``, or the largest singular value, ``kind=2``, of one set of examples the
        largest absolute eigenvalue; others raise :class:`ArgumentError`.
        """
        if is_spectral(kind):
            return torch.stack([largest_singular_value(m) for m in self._symmetric_parts()]).max()
        if not (kind is None or (isinstance(kind, str) and kind == "fro")):
            raise ArgumentError(f"norm({kind!r}) is not offered; expected 'fro' or 2 (K.eigh()[0]: all eigenvalues)")
        return self.tensor.norm()

    # -- square kernels ------------------------------------------------------------------------------------------------

    @abstractmethod
    def diag(self) -> FVector:
        """The diagonal, ``(c, n)``."""

    @abstractmethod
    def _symmetric_parts(self) -> Tensor:
        """``[parts, p, p]``: the diagonal blocks, rows in flat order."""

    def _require_symmetric(self, what: str) -> None:
        """Raise for a kernel between two sets, of equal size perhaps; a few rows tell, at a cost that does not show."""
        self._require_square(what)
        m = self._symmetric_parts().detach()
        if not m.numel():
            return
        step = -(-m.shape[-1] // 8)
        rows, columns = m[:, ::step], m[..., ::step].mT
        if bool((rows - columns).abs().max() > torch.finfo(m.dtype).eps ** 0.5 * rows.abs().max()):
            raise ArgumentError(
                f"{what} needs a symmetric kernel, that of one set of examples; this one is between two, or was given "
                "as a tensor that is not symmetric: torch.linalg works on K.to_dense()"
            )

    def _as_parts(self, f: Tensor) -> Tensor:
        """``[*b, c, n] -> [*b, parts, p]``."""
        parts = self._symmetric_parts().shape[0]
        return f.reshape(*f.shape[:-2], parts, -1)

    def trace(self) -> Tensor:
        """``tr K``."""
        return self.diag().tensor.sum()

    def solve(self, f: HasColumns[C], damping: float | Tensor | Damping = 0.0) -> C:
        """``(K + damping I)^-1 f``, batched, or of all columns of a ``PushForwardDense`` or a kernel ``f`` at once;
        ``Cutoff(x)`` gives the pseudo-inverse.

        Raises :class:`SingularError` where the damped kernel is not positive definite to rounding.
        """
        if has_columns(f):
            self._require_symmetric("solve")
            return cast(C, by_columns(self, f, lambda u: self.solve(u, damping)))
        self._require_symmetric("solve")
        d, m = as_damping(damping), self._symmetric_parts()
        given = self.operand(f, self.columns)
        x = self._as_parts(given)  # [*b, parts, p]
        flat = x.reshape(-1, *x.shape[-2:]).permute(1, 2, 0)  # [parts, p, b]
        if isinstance(d, Cutoff):
            values, u = linalg.eigh(m)
            out = u @ (reciprocal(values, d, "the kernel").unsqueeze(-1) * (u.mT @ flat))
        else:
            out = torch.cholesky_solve(flat, linalg.cholesky(*self._shifted(d)))
        return cast(C, FVector(out.permute(2, 0, 1).reshape(given.shape)))

    def inverse(self, damping: float | Tensor | Damping = 0.0) -> Self:
        """``(K + damping I)^-1`` as a kernel of the same kind; ``damping`` and errors as for :meth:`solve`."""
        self._require_symmetric("inverse")
        d, m = as_damping(damping), self._symmetric_parts()
        if isinstance(d, Cutoff):
            values, u = linalg.eigh(m)
            parts = (u * reciprocal(values, d, "the kernel").unsqueeze(-2)) @ u.mT
        else:
            parts = torch.cholesky_inverse(linalg.cholesky(*self._shifted(d)))
        return self.map_tensors(lambda t: parts.view(t.shape))

    def _number(self, damping: Damping) -> float | Tensor:
        if not isinstance(damping, Tikhonov):
            raise ArgumentError(
                f"damping is {damping!r}; a kernel has no Kronecker factors: expected a number >= 0 or Cutoff(x)"
            )
        return damping.value

    def _shifted(self, damping: Damping) -> tuple[Tensor, str]:
        """The parts of ``K + damping I``, and what to call it where it is singular."""
        m = self._symmetric_parts()
        shift = self._number(damping) * torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
        return m + shift, f"the kernel with damping {damping.value:g}"

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """``log det(K + damping I)``; ``-inf`` where that is singular: without damping where :meth:`solve` raises."""
        self._require_symmetric("logdet")
        d = as_damping(damping)
        try:
            return linalg.cholesky_logdet(*self._shifted(d)).sum()
        except SingularError:
            if d.value > 0:
                m = self._symmetric_parts()
                return log_sum(zero_small(torch.linalg.eigvalsh(m.double())) + d.value).to(m)
            return log_sum(self.tensor.new_zeros(1) + d.value)

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``(c n,)``, ascending, and eigenvectors ``(c n, c n)``, columns in the same order."""
        self._require_symmetric("eigh")
        values, u = linalg.eigh(self._symmetric_parts())
        flat, order = values.flatten().sort(stable=True)
        return flat, torch.block_diag(*u)[:, order].contiguous() if len(u) > 1 else u[0]

    def eigvalsh(self) -> Tensor:
        """Eigenvalues ``(c n,)``, ascending, without eigenvectors; computed in float64."""
        self._require_symmetric("eigvalsh")
        m = self._symmetric_parts()
        return torch.linalg.eigvalsh(m.double()).flatten().sort()[0].to(m)


def _common(x: type[FMat], y: type[FMat]) -> type[FMat] | None:
    """The narrowest representation that holds kernels of both."""
    pairs = ((a, b) for a in _holders(x) for b in _holders(y))
    return next((a if issubclass(b, a) else b for a, b in pairs if issubclass(a, b) or issubclass(b, a)), None)


def _holders(kind: type[FMat] | None) -> Iterator[type[FMat]]:
    """The representations that hold kernels of a kind, from itself to the widest."""
    while kind is not None:
        yield kind
        kind = kind.wider
