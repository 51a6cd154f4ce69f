"""An orthonormal basis of the whole space as reflections: never ``p x p``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.pmat.block import BlockBasis


@dataclass(frozen=True, eq=False)
class HouseholderBasis(BlockBasis):
    """A basis of the whole space that starts with given orthonormal vectors, as reflections: never ``p x p``."""

    a: Tensor  # [p r]
    tau: Tensor  # [r]
    signs: Tensor  # [r]

    @staticmethod
    def of(v: Tensor) -> HouseholderBasis:
        """The basis that starts with the orthonormal rows ``v [r, p]``."""
        a, tau = torch.geqrf(v.T)
        return HouseholderBasis(a, tau, a.diagonal().sign())

    def mv(self, x: Tensor) -> Tensor:
        return self._apply(self._flip(x), transpose=False)

    def tmv(self, x: Tensor) -> Tensor:
        return self._flip(self._apply(x, transpose=True))

    def _apply(self, x: Tensor, *, transpose: bool) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).T.contiguous()
        return torch.ormqr(self.a, self.tau, flat, left=True, transpose=transpose).T.reshape(x.shape)

    def _flip(self, x: Tensor) -> Tensor:
        r = self.signs.shape[0]
        return torch.cat([x[..., :r] * self.signs, x[..., r:]], -1)
