"""The eigenbasis of a Kronecker product: one basis a factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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

    def write_rows(self, x: Tensor, scale: Tensor, out: Tensor) -> None:
        ua, ug = self.ua, self.ug
        if not (isinstance(ua, Tensor) and isinstance(ug, Tensor) and ua.ndim == ug.ndim == 3):
            return super().write_rows(x, scale, out)
        m, (s, o, i) = len(x), scale.shape
        # One product of all rows a factor takes 0.7 of the time of one a row, with factors that lie as it reads them
        # 0.6 (sides 32 to 256, one thread, MKL).
        side, into = x.permute(1, 2, 0, 3).contiguous(), out.view(s, o, m * i)
        turned = torch.bmm(ug.mT.contiguous(), side.view(s, o, m * i), out=into)
        torch.bmm(turned.view(s, o * m, i), ua.mT.contiguous().mT, out=side.view(s, o * m, i))
        torch.mul(scale.unsqueeze(2), side, out=out.permute(1, 2, 0, 3))
