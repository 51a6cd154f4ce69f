"""The eigenbasis of a Kronecker product: one basis a factor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nngeom.core import linalg
from nngeom.core.linalg import Basis
from nngeom.pmat.block import BlockBasis


@dataclass(frozen=True, eq=False)
class KroneckerBasis(BlockBasis):
    """``ug (x) ua``; ``None`` is the identity."""

    ua: Basis | None  # [s i i]
    ug: Basis | None  # [s o o]

    def mv(self, x: Tensor) -> Tensor:
        return linalg.right(linalg.left(self.ug, x), self.ua, transpose=True)

    def tmv(self, x: Tensor) -> Tensor:
        return linalg.right(linalg.left(self.ug, x, transpose=True), self.ua)
