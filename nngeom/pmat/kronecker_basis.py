"""The eigenbasis of a Kronecker product: one basis a factor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import linalg, memory
from nngeom.core.layout import Layout
from nngeom.core.linalg import Basis
from nngeom.pmat.block import PIECE, BlockBasis


@dataclass(frozen=True, eq=False)
class KroneckerBasis(BlockBasis):
    """``ug (x) ua``; ``None`` is the identity."""

    ua: Basis | None  # [s i i]
    ug: Basis | None  # [s o o]

    def mv(self, x: Tensor) -> Tensor:
        return linalg.right(linalg.left(self.ug, x), self.ua, transpose=True)

    def tmv(self, x: Tensor) -> Tensor:
        return linalg.right(linalg.left(self.ug, x, transpose=True), self.ua)

    def columns_of(self, r: Tensor, layout: Layout, scale: Tensor) -> Iterator[Tensor]:
        ua, ug = self.ua, self.ug
        if not (isinstance(ua, Tensor) and isinstance(ug, Tensor) and ua.ndim == ug.ndim == 3):
            yield from super().columns_of(r, layout, scale)
            return
        # Few rows at a time along one factor, few columns along the other: what is yielded is in the processor's cache.
        # One product of many rows a factor takes 0.7 of the time of one a row (sides 32 to 256, one thread, MKL).
        m, (s, o, i) = len(r), scale.shape
        inside, turn_a, turn_g = r.new_empty(s, i, m, o), ua.mT.contiguous(), ug.mT.contiguous()
        for lo, hi in memory.pieces(m, scale.numel() * r.element_size(), most=PIECE):
            x = r.new_empty(s, hi - lo, o, i)
            layout.gather_into(r[lo:hi], x.transpose(0, 1))
            torch.bmm(turn_a, x.view(s, -1, i).mT, out=inside.view(s, i, m * o)[..., lo * o : hi * o])
        for lo, hi in memory.pieces(i, s * o * m * r.element_size(), most=PIECE):
            some = torch.bmm(turn_g, inside[:, lo:hi].reshape(s, -1, o).mT).view(s, o, hi - lo, m)
            yield some.mul_(scale[..., lo:hi].unsqueeze(-1)).view(-1, m).T
