"""The diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nngeom.core.damping import Damping
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.statistic import Named
from nngeom.pmat.block import Block, Identity, reciprocal
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Recipe, Selection
from nngeom.sweep.sweep import Chunk


@dataclass(frozen=True, eq=False)
class DiagBlock(Block):
    """``d * x``."""

    d: Tensor  # [s o i]

    def mv(self, x: Tensor) -> Tensor:
        return self.d * x

    def diag(self) -> Tensor:
        return self.d

    def squared_norm(self) -> Tensor:
        return self.d.square().sum()

    def scaled(self, c: float | Tensor) -> DiagBlock:
        return DiagBlock(c * self.d)

    def added(self, other: Block) -> DiagBlock | None:
        return DiagBlock(self.d + other.d) if isinstance(other, DiagBlock) else None

    def inverse(self, damping: Damping) -> DiagBlock:
        return DiagBlock(reciprocal(self.d, damping, "the diagonal matrix"))

    def eigh(self) -> tuple[Tensor, Identity]:
        return self.d, Identity()


class PMatDiag(PMat):
    """The exact diagonal, everything else dropped."""

    entries = "diagonal"

    @classmethod
    def recipe(cls, selection: Selection) -> Recipe:
        def statistic(chunk: Chunk) -> Named:
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
    def entries_of(cls, layout: Layout, rows: LayerJacobian | None, selection: Selection, **options: Any) -> int | None:
        return layout.numel
