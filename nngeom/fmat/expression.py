"""What kernels of different kinds make: sums, lazy and with the operations their parts allow, and dense products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core.damping import Damping
from nngeom.fmat.columns import C, HasColumns
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.operator import DENSE_LIMIT, FunctionOperator
from nngeom.space.fvector import FVector


@dataclass(frozen=True, eq=False, repr=False)
class FMatSum(FunctionOperator):
    """``sum_j weight_j K_j``."""

    parts: tuple[FunctionOperator, ...]
    weights: tuple[float | Tensor, ...] | None = None

    def _weighted(self) -> Iterator[tuple[float | Tensor, FunctionOperator]]:
        return zip(self.weights or (1.0,) * len(self.parts), self.parts)

    @property
    def outputs(self) -> int:
        return self.parts[0].outputs

    @property
    def rows(self) -> int:
        return self.parts[0].rows

    @property
    def columns(self) -> int:
        return self.parts[0].columns

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.parts[0].dtype
        for part in self.parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def product(self, f: Tensor) -> Tensor:
        return torch.stack([(w * p.product(f.to(p.dtype))).to(self.dtype) for w, p in self._weighted()]).sum(0)

    @property
    def T(self) -> FMatSum:
        return FMatSum(tuple(p.T for p in self.parts), self.weights)

    def scaled(self, c: float | Tensor) -> Self:
        return replace(self, weights=tuple(c * w for w, _ in self._weighted()))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        return replace(self, parts=tuple(p.to(*args, **kwargs) for p in self.parts))

    def trace(self) -> Tensor:
        """``tr K``."""
        return torch.stack([(w * p.trace()).to(self.dtype) for w, p in self._weighted()]).sum()

    def diag(self) -> FVector:
        """The diagonal."""
        return FVector(torch.stack([(w * p.diag().tensor).to(self.dtype) for w, p in self._weighted()]).sum(0))

    def materialize(self, limit: int = DENSE_LIMIT) -> FMatDense:
        """The same kernel as an :class:`FMatDense`."""
        return FMatDense(self.to_dense(limit).view(self.outputs, self.rows, self.outputs, self.columns))

    def norm(self, kind: str | int = "fro") -> Tensor:
        """The Frobenius norm, or the spectral one (``kind=2``), of the dense kernel."""
        return self.materialize().norm(kind)

    def inverse(self, damping: float | Tensor | Damping = 0.0) -> FMatDense:
        """``(K + damping I)^-1`` of the dense kernel."""
        return self.materialize().inverse(damping)

    def solve(self, f: HasColumns[C], damping: float | Tensor | Damping = 0.0) -> C:
        """``(K + damping I)^-1 f`` with the dense kernel."""
        return self.materialize().solve(f, damping)

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """``log det(K + damping I)`` of the dense kernel."""
        return self.materialize().logdet(damping)

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the dense kernel."""
        return self.materialize().eigh()


def product(x: FunctionOperator, y: FunctionOperator) -> FMatDense:
    """``K K'`` with all its entries."""
    entries = x.to_dense() @ y.to_dense().to(x.dtype)
    return FMatDense(entries.view(x.outputs, x.rows, x.outputs, y.columns))


def of_columns(columns: Tensor, examples: int) -> FMatDense:
    """The kernel with ``columns [(c m), c, n]``, of so many ``examples`` ``m``."""
    return FMatDense(columns.permute(1, 2, 0).unflatten(-1, (-1, examples)).contiguous())


FunctionOperator.expressions.update(sum=lambda x, y: FMatSum((x, y)), product=product, columns=of_columns)
