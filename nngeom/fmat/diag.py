"""The diagonal of a kernel: squared norms of the gradients, without any kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from nngeom.core.damping import Cutoff, Damping, Tikhonov, as_damping
from nngeom.fmat.columns import C, HasColumns, by_columns, has_columns
from nngeom.fmat.dense import FMatBlockDiag, require_ndim
from nngeom.fmat.fmat import FMat
from nngeom.pmat.arguments import is_spectral
from nngeom.pmat.eigenvalues import reciprocal, shifted_logdet
from nngeom.space.fvector import FVector


@dataclass(frozen=True, eq=False, repr=False)
class FMatDiag(FMat):
    """``tensor[k, n]``: the squared norm of the gradient of output ``k`` at example ``n``."""

    tensor: Tensor  # [c n]

    diagonal: ClassVar[bool] = True
    wider: ClassVar[type[FMat]] = FMatBlockDiag

    def __post_init__(self) -> None:
        require_ndim(self.tensor, "FMatDiag", "(c, n)", 2)

    @property
    def outputs(self) -> int:
        return self.tensor.shape[0]

    @property
    def rows(self) -> int:
        return self.tensor.shape[1]

    @property
    def columns(self) -> int:
        return self.tensor.shape[1]

    def product(self, f: Tensor) -> Tensor:
        return self.tensor * f

    def _dense(self) -> Tensor:
        return torch.diag(self.tensor.flatten())

    @property
    def T(self) -> FMatDiag:
        return self

    def widened(self) -> FMatBlockDiag:
        return FMatBlockDiag(torch.diag_embed(self.tensor))

    def diag(self) -> FVector:
        return FVector(self.tensor)

    def _symmetric_parts(self) -> Tensor:
        return self.tensor.flatten()[:, None, None]

    def norm(self, kind: str | int = "fro") -> Tensor:
        return self.tensor.abs().max() if is_spectral(kind) else super().norm(kind)

    def solve(self, f: HasColumns[C], damping: float | Tensor | Damping = 0.0) -> C:
        if has_columns(f):
            return cast(C, by_columns(self, f, lambda u: self.solve(u, damping)))
        d = as_damping(damping)
        if not isinstance(d, Cutoff):
            self._number(d)
        return cast(C, FVector(reciprocal(self.tensor, d, "the diagonal kernel") * self.operand(f, self.columns)))

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        return shifted_logdet(self.tensor.flatten(), Tikhonov(self._number(as_damping(damping))))

    def eigh(self) -> tuple[Tensor, Tensor]:
        values, order = self.tensor.flatten().sort(stable=True)
        return values, torch.eye(len(values), dtype=self.dtype, device=self.device)[:, order].contiguous()
