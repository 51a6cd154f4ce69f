"""Dense blocks: one for the whole matrix, or one a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core import linalg
from nngeom.core.damping import Damping, Tikhonov
from nngeom.core.errors import SingularError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.statistic import Named
from nngeom.pmat.block import Block, BlockBasis
from nngeom.pmat.block_algebra import Remake, largest
from nngeom.pmat.eigenvalues import by_eigenvalues, definite_factor, log_sum, reciprocal, shifted, zero_small
from nngeom.pmat.given import (
    foreign,
    require_alike,
    require_count,
    require_cover,
    require_mapping,
    require_square,
)
from nngeom.pmat.kept import kept_factor
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Recipe, Selection, join_rows
from nngeom.space.collection import LayerCollection
from nngeom.space.joined import require_collection
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
        if by_eigenvalues(damping):
            values, u = linalg.eigh(self.m)
            return DenseBlock((u * reciprocal(values, damping, "the dense matrix")) @ u.T)
        return DenseBlock(torch.cholesky_inverse(definite_factor(self.m, damping, "the dense matrix")))

    def solve(self, b: Tensor, damping: Damping) -> Tensor:
        if by_eigenvalues(damping):
            return self.inverse(damping).mv(b)
        factor = kept_factor(self, (self.m,), lambda: self.m, damping, "the dense matrix")
        x = torch.cholesky_solve(b.reshape(-1, b.shape[-1]).T, factor)
        return x.T.reshape(b.shape)

    def logdet(self, damping: Tikhonov) -> Tensor:
        """Twice the logarithms of the Cholesky pivots: without ``damping`` ``-inf`` just where :meth:`solve` raises."""
        try:
            return linalg.cholesky_logdet(*shifted(self.m, damping, "the dense matrix"))
        except SingularError:
            return super().logdet(damping) if damping.value > 0 else log_sum(self.m.new_zeros(1) + damping.value)

    def eigh(self) -> tuple[Tensor, DenseBasis]:
        values, u = linalg.eigh(self.m)
        return zero_small(values)[None, None], DenseBasis(u)

    def spectrum(self) -> tuple[Tensor, Remake]:
        values, basis = self.eigh()
        return values, lambda f: DenseBlock((basis.u * f.flatten()) @ basis.u.T)

    def spectral_norm(self) -> Tensor:
        return largest(torch.linalg.eigvalsh(self.m.double())).to(self.m)

    def restricted(self, columns: list[int]) -> DenseBlock:
        return DenseBlock(self.m[columns][:, columns])

    def plus_diagonal(self, d: Tensor) -> DenseBlock:
        m = self.m.clone()
        m.diagonal().add_(d.flatten())
        return DenseBlock(m)


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

    @classmethod
    def from_tensor(cls, lc: LayerCollection, tensor: Tensor, examples: int = 1) -> Self:
        """The symmetric matrix ``tensor (d, d)`` over the parameters of ``lc``, in flat order; a copy.

        ``examples``: how many it is a mean over, for :func:`nngeom.merge`. Raises :class:`ArgumentError` for another
        shape or an asymmetric one, :class:`NonFiniteError` for NaN and infinity.
        """
        d = require_collection(lc).numel
        m = require_square(tensor, d, "the matrix")
        return cls.of_blocks(lc, {lc.span(): DenseBlock(m)}, require_count(examples))


class PMatBlockDiag(PMat):
    """One dense block a layer; covariances between layers are dropped."""

    entries = "layers"
    layerwise = True
    blocks_in_layers = True

    @classmethod
    def recipe(cls, selection: Selection) -> Recipe:
        layers = {selection.collection.span(names): names for names in selection.by_layer().values()}
        return (yield from dense_recipe(layers))

    @classmethod
    def entries_of(cls, layout: Layout, rows: LayerJacobian | None, selection: Selection, **options: Any) -> int | None:
        return layout.numel * selection.numel(beside=layout.names[0])

    @classmethod
    def from_blocks(cls, lc: LayerCollection, blocks: Mapping[str, Tensor], examples: int = 1) -> Self:
        """The symmetric ``blocks {layer: (p, p)}`` of all layers of ``lc``, parameters in flat order; copies.

        ``examples``: how many they are means over, for :func:`nngeom.merge`. Raises :class:`CollectionError` for a
        missing or foreign layer, :class:`ArgumentError` for another shape or an asymmetric block.
        """
        layers, found = require_collection(lc).by_layer(), {}
        for layer, tensor in require_mapping(blocks, "tensor (p, p)").items():
            if layer not in layers:
                raise foreign(lc, layer)
            layout = lc.span(layers[layer])
            found[layout] = DenseBlock(require_square(tensor, layout.numel, f"the block of {layer!r}"))
        require_cover(lc, [name for layout in found for name in layout.names])
        require_alike([block.m for block in found.values()])
        return cls.of_blocks(lc, dict(found), require_count(examples))
