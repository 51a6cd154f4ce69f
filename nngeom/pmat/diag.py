"""The diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import Self

from nngeom.core.damping import Damping
from nngeom.core.errors import ArgumentTypeError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.statistic import Named
from nngeom.pmat.block import Block, Identity
from nngeom.pmat.block_algebra import Remake
from nngeom.pmat.eigenvalues import reciprocal
from nngeom.pmat.given import require_count, require_entries
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Recipe, Selection
from nngeom.space.pvector import PVector
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

    def spectrum(self) -> tuple[Tensor, Remake]:
        return self.d, DiagBlock

    def restricted(self, columns: list[int]) -> DiagBlock:
        return DiagBlock(self.d[..., columns])

    def plus_diagonal(self, d: Tensor) -> DiagBlock:
        return DiagBlock(self.d + d)


Block.of_diagonal = DiagBlock


class PMatDiag(PMat):
    """The exact diagonal, everything else dropped."""

    entries = "diagonal"
    any_columns = True
    layerwise = True

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

    @classmethod
    def from_vector(cls, vector: PVector, examples: int = 1) -> Self:
        """The diagonal matrix of the entries of ``vector (d,)``, a copy.

        ``examples``: how many it is a mean over, for :func:`nngeom.merge`. Raises :class:`ArgumentError` for a batch of
        vectors, :class:`NonFiniteError` for NaN and infinity.
        """
        if not isinstance(vector, PVector):
            raise ArgumentTypeError(
                f"the diagonal is {type(vector).__name__}; expected a PVector, PVector.from_dict(lc, tensors)"
            )
        lc = vector.layer_collection
        span = lc.span()
        d = span.gather(require_entries(vector.flat(), "the diagonal", lc.numel))
        return cls.of_blocks(lc, {span: DiagBlock(d)}, require_count(examples))
