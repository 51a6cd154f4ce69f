"""Rows less their mean: centred rows have no factors of their own, only entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core.jacobian import LayerJacobian


@dataclass(frozen=True, eq=False)
class CentredJacobian(LayerJacobian):
    """Rows minus a mean, that of their cotangent."""

    inner: LayerJacobian
    mean: Tensor  # [k s o i]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.mean.dtype

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def matrix(self) -> Tensor:
        return self.inner.matrix() - self.mean.unsqueeze(1)

    def examples(self, lo: int, hi: int) -> CentredJacobian:
        return CentredJacobian(self.inner.examples(lo, hi), self.mean)

    def cotangents(self, lo: int, hi: int) -> CentredJacobian:
        return CentredJacobian(self.inner.cotangents(lo, hi), self.mean[lo:hi])
