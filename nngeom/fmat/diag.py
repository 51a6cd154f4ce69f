"""The diagonal of a kernel: squared norms of the gradients, without any kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nngeom.core.damping import Cutoff, as_damping
from nngeom.fmat.dense import FMatBlockDiag, require_ndim
from nngeom.fmat.fmat import FMat
from nngeom.fmat.operator import HasColumns
from nngeom.pmat.block import reciprocal, shifted_logdet
from nngeom.space.fvector import FVector


@dataclass(frozen=True, eq=False, repr=False)
class FMatDiag(FMat):
    """``tensor[k, n]``: the squared norm of the gradient of output ``k`` at example ``n``."""

    tensor: Tensor  # [c n]

    diagonal: ClassVar[bool] = True
    wider: ClassVar[type[FMat]] = FMatBlockDiag

    def __post_init__(self):
        require_ndim(self.tensor, "FMatDiag", "(c, n)", 2)

    @property
    def outputs(self):
        return self.tensor.shape[0]

    @property
    def rows(self):
        return self.tensor.shape[1]

    @property
    def columns(self):
        return self.tensor.shape[1]

    def product(self, f):
        return self.tensor * f

    def _dense(self):
        return torch.diag(self.tensor.flatten())

    @property
    def T(self):
        return self

    def widened(self):
        return FMatBlockDiag(torch.diag_embed(self.tensor))

    def diag(self):
        return FVector(self.tensor)

    def _symmetric_parts(self):
        return self.tensor.flatten()[:, None, None]

    def solve(self, f, damping=0.0):
        if isinstance(f, HasColumns):
            return f.map_columns(lambda u: self.solve(u, damping))
        d = as_damping(damping)
        if not isinstance(d, Cutoff):
            self._number(d)
        return FVector(reciprocal(self.tensor, d, "the diagonal kernel") * self.operand(f, self.columns))

    def logdet(self, damping=0.0):
        d = as_damping(damping)
        self._number(d)
        return shifted_logdet(self.tensor.flatten(), d)

    def eigh(self):
        values, order = self.tensor.flatten().sort(stable=True)
        return values, torch.eye(len(values), dtype=self.dtype, device=self.device)[:, order].contiguous()
