"""Dense blocks: one for the whole matrix, or one a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.damping import Cutoff, Damping, Tikhonov
from nngeom.core.errors import SingularError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.statistic import Named
from nngeom.pmat.block import Block, BlockBasis, log_sum, reciprocal, zero_small
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Recipe, Selection, join_rows
from nngeom.sweep.sweep import Chunk


@dataclass(frozen=True, eq=False)
class DenseBlock(Block):
    """``M x`` with an explicit matrix ``m [p, p]`` over the flattened block ``[1, 1, p]``."""

    m: Tensor  # [p p]

    def mv(self, x: Tensor) -> Tensor:
        return x @ self.m

    def diag(self) -> Tensor:
        return self.m.diagonal()[None, None]

    def squared_norm(self) -> Tensor:
        return self.m.square().sum()

    def scaled(self, c: float | Tensor) -> DenseBlock:
        return DenseBlock(c * self.m)

    def added(self, other: Block) -> DenseBlock | None:
        return DenseBlock(self.m + other.m) if isinstance(other, DenseBlock) else None

    def dense(self) -> Tensor:
        return self.m

    def inverse(self, damping: Damping) -> DenseBlock:
        if isinstance(damping, Cutoff):
            values, u = linalg.eigh(self.m)
            return DenseBlock((u * reciprocal(values, damping, "the dense matrix")) @ u.T)
        return DenseBlock(torch.cholesky_inverse(linalg.cholesky(*self._shifted(damping))))

    def solve(self, b: Tensor, damping: Damping) -> Tensor:
        if isinstance(damping, Cutoff):
            return self.inverse(damping).mv(b)
        x = torch.cholesky_solve(b.reshape(-1, b.shape[-1]).T, linalg.cholesky(*self._shifted(damping)))
        return x.T.reshape(b.shape)

    def logdet(self, damping: Tikhonov) -> Tensor:
        """Twice the logarithms of the Cholesky pivots: without ``damping`` ``-inf`` just where :meth:`solve` raises."""
        try:
            return linalg.cholesky_logdet(*self._shifted(damping))
        except SingularError:
            return super().logdet(damping) if damping.value > 0 else log_sum(self.m.new_zeros(1) + damping.value)

    def _shifted(self, damping: Damping) -> tuple[Tensor, str]:
        """``M + damping I``, and what to call it where it is singular."""
        shifted = self.m.clone()
        shifted.diagonal().add_(damping.value)
        return shifted, f"the dense matrix with damping {damping.value:g}"

    def eigh(self) -> tuple[Tensor, DenseBasis]:
        values, u = linalg.eigh(self.m)
        return zero_small(values)[None, None], DenseBasis(u)


@dataclass(frozen=True, eq=False)
class DenseBasis(BlockBasis):
    """Explicit eigenvectors, the columns of ``u``."""

    u: Tensor  # [p p]

    def mv(self, x: Tensor) -> Tensor:
        return x @ self.u.T

    def tmv(self, x: Tensor) -> Tensor:
        return x @ self.u


def dense_recipe(layouts: dict[Layout, tuple[str, ...]]) -> Recipe:
    """Second moments of the rows over the given spans of parameters."""

    def statistic(chunk: Chunk) -> Named:
        named = {}
        for layout, names in layouts.items():
            total = None
            for rows in join_rows(chunk, layout, names):
                total = linalg.add_gram_(total, rows.flatten(0, 1))
            if total is not None:
                named[layout] = {"m": linalg.mirror_(total)}
        return named

    means = yield statistic
    return {layout: DenseBlock(tensors["m"]) for layout, tensors in means.items()}


class PMatDense(PMat):
    """The whole matrix, ``d x d``."""

    entries = "all"

    @classmethod
    def recipe(cls, selection: Selection) -> Recipe:
        layout = selection.span()
        return (yield from dense_recipe({layout: layout.names}))

    @classmethod
    def entries_of(cls, layout: Layout, rows: LayerJacobian | None, selection: Selection, **options: Any) -> int | None:
        return layout.numel * selection.numel()


class PMatBlockDiag(PMat):
    """One dense block a layer; covariances between layers are dropped."""

    entries = "layers"

    @classmethod
    def recipe(cls, selection: Selection) -> Recipe:
        layers = {selection.collection.span(names): names for names in selection.by_layer().values()}
        return (yield from dense_recipe(layers))

    @classmethod
    def entries_of(cls, layout: Layout, rows: LayerJacobian | None, selection: Selection, **options: Any) -> int | None:
        return layout.numel * selection.numel(beside=layout.names[0])
