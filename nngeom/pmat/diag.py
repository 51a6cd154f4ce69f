"""The diagonal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nngeom.pmat.block import Block, Identity, reciprocal
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Selection


@dataclass(frozen=True, eq=False)
class DiagBlock(Block):
    """``d * x``."""

    d: Tensor  # [s o i]

    def mv(self, x):
        return self.d * x

    def diag(self):
        return self.d

    def squared_norm(self):
        return self.d.square().sum()

    def scaled(self, c):
        return DiagBlock(c * self.d)

    def added(self, other):
        return DiagBlock(self.d + other.d) if isinstance(other, DiagBlock) else None

    def inverse(self, damping):
        return DiagBlock(reciprocal(self.d, damping, "the diagonal matrix"))

    def eigh(self):
        return self.d, Identity()


class PMatDiag(PMat):
    """The exact diagonal, everything else dropped."""

    entries = "diagonal"

    @classmethod
    def recipe(cls, selection: Selection):
        def statistic(chunk):
            return {layout: {"d": j.square()} for layout, j in chunk.jacobians.items()}

        means = yield statistic
        if not means:
            return {}
        span = selection.span()
        flat = next(iter(means.values()))["d"].new_zeros(max(p.stop for p in span.pieces))
        for layout, tensors in means.items():  # a parameter used differently in different batches has several
            layout.scatter_(flat, layout.gather(flat) + tensors["d"])
        return {span: DiagBlock(span.gather(flat))}

    @classmethod
    def entries_of(cls, layout, rows, selection):
        return layout.numel
