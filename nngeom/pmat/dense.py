"""Dense blocks: one for the whole matrix, or one a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.damping import Cutoff
from nngeom.core.errors import SingularError
from nngeom.core.layout import Layout
from nngeom.pmat.block import Block, BlockBasis, definite_factor, log_sum, reciprocal, shifted, zero_small
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Selection, join_rows


@dataclass(frozen=True, eq=False)
class DenseBlock(Block):
    """``M x`` with an explicit matrix over the flattened block ``[1, 1, p]``."""

    m: Tensor  # [p p]

    def mv(self, x):
        return x @ self.m

    def diag(self):
        return self.m.diagonal()[None, None]

    def squared_norm(self):
        return self.m.square().sum()

    def scaled(self, c):
        return DenseBlock(c * self.m)

    def added(self, other):
        return DenseBlock(self.m + other.m) if isinstance(other, DenseBlock) else None

    def dense(self):
        return self.m

    def inverse(self, damping):
        if isinstance(damping, Cutoff):
            values, u = linalg.eigh(self.m)
            return DenseBlock((u * reciprocal(values, damping, "the dense matrix")) @ u.T)
        return DenseBlock(torch.cholesky_inverse(definite_factor(self.m, damping, "the dense matrix")))

    def solve(self, b, damping):
        if isinstance(damping, Cutoff):
            return self.inverse(damping).mv(b)
        x = torch.cholesky_solve(b.reshape(-1, b.shape[-1]).T, definite_factor(self.m, damping, "the dense matrix"))
        return x.T.reshape(b.shape)

    def logdet(self, damping):
        """Twice the logarithms of the Cholesky pivots: without damping ``-inf`` exactly where :meth:`solve` raises."""
        try:
            return linalg.cholesky_logdet(*shifted(self.m, damping, "the dense matrix"))
        except SingularError:
            return super().logdet(damping) if damping.value > 0 else log_sum(self.m.new_zeros(1) + damping.value)

    def eigh(self):
        values, u = linalg.eigh(self.m)
        return zero_small(values)[None, None], DenseBasis(u)


@dataclass(frozen=True, eq=False)
class DenseBasis(BlockBasis):
    """Explicit eigenvectors, the columns of ``u``."""

    u: Tensor  # [p p]

    def mv(self, x):
        return x @ self.u.T

    def tmv(self, x):
        return x @ self.u


def dense_recipe(layouts: dict[Layout, tuple[str, ...]]):
    """Second moments of the rows over the given spans of parameters."""

    def statistic(chunk):
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
    def recipe(cls, selection: Selection):
        layout = selection.span()
        return (yield from dense_recipe({layout: layout.names}))


class PMatBlockDiag(PMat):
    """One dense block a layer; covariances between layers are dropped."""

    entries = "layers"

    @classmethod
    def recipe(cls, selection: Selection):
        layers = {selection.collection.span(names): names for names in selection.by_layer().values()}
        return (yield from dense_recipe(layers))
