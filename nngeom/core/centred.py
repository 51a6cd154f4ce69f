"""Rows less their mean: centred rows have no factors of their own, only entries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nngeom.core.jacobian import LayerJacobian


@dataclass(frozen=True, eq=False)
class CentredJacobian(LayerJacobian):
    """Rows minus a mean."""

    inner: LayerJacobian
    mean: Tensor  # [s o i]

    @property
    def shape(self):
        return self.inner.shape

    @property
    def dtype(self):
        return self.mean.dtype

    @property
    def device(self):
        return self.mean.device

    def matrix(self):
        return self.inner.matrix() - self.mean

    def examples(self, lo, hi):
        return CentredJacobian(self.inner.examples(lo, hi), self.mean)

    def cotangents(self, lo, hi):
        return CentredJacobian(self.inner.cotangents(lo, hi), self.mean)
