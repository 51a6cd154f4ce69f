"""Orthonormal bases of parameter space, blockwise: what ``eigh`` returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from nngeom.core.errors import SizeError
from nngeom.core.layout import Layout
from nngeom.pmat.block import BlockBasis
from nngeom.pmat.operator import DENSE_LIMIT
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector


@dataclass(frozen=True, eq=False, repr=False)
class Basis:
    """An orthonormal basis of parameter space, blockwise: never ``d x d`` for structured matrices.

    ``U.mv`` maps coordinates (in the order of the eigenvalues) to parameters, ``U.T.mv`` back; both take and give a
    PVector or a flat tensor ``(*batch, d)``, as they are given (a dict of named tensors is a PVector).

    ``parts``: bases of the blocks of ``layer_collection``; ``order [d]``: the place of each ascending eigenvalue in the
    blocks' own order; ``dtype``: of the entries; ``transposed``: this is ``U^T``.
    """

    layer_collection: LayerCollection
    parts: dict[Layout, BlockBasis]
    order: Tensor  # [d]: place of each ascending eigenvalue in the blocks' own order
    dtype: torch.dtype
    transposed: bool = False

    def __repr__(self) -> str:
        d = self.layer_collection.numel
        transposed = ", transposed" if self.transposed else ""
        return f"Basis(shape=({d}, {d}), blocks={len(self.parts)}, dtype={self.dtype}{transposed})"

    @property
    def T(self) -> Basis:
        """The transpose, which is the inverse."""
        return dataclasses.replace(self, transposed=not self.transposed)

    @overload
    def mv(self, x: PVector) -> PVector: ...
    @overload
    def mv(self, x: Tensor) -> Tensor: ...
    def mv(self, x: Any) -> Any:
        """``U x``, or ``U^T x`` when transposed."""
        if isinstance(x, Mapping):
            x = PVector.from_dict(self.layer_collection, x)
        if isinstance(x, PVector):
            self.layer_collection.require(x.layer_collection, "the vector")
            return PVector(self.layer_collection, self.mv(x.flat()))
        out = torch.empty_like(x)
        if self.transposed:
            for layout, basis in self.parts.items():
                layout.scatter_(out, basis.tmv(layout.gather(x)))
            return out[..., self.order]
        own = torch.empty_like(x)
        own[..., self.order] = x
        for layout, basis in self.parts.items():
            layout.scatter_(out, basis.mv(layout.gather(own)))
        return out

    __matmul__ = mv

    def to_dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """``(d, d)``, eigenvectors as columns; raises :class:`SizeError` above ``limit`` parameters."""
        d = self.layer_collection.numel
        if d > limit:
            raise SizeError(
                f"the dense basis has {d} x {d} entries; the limit is {limit} parameters: pass "
                f"to_dense(limit={d}) to have it anyway"
            )
        eye = torch.eye(d, dtype=self.dtype, device=self.order.device)
        return self.mv(eye).T.contiguous()
