"""A multiple of the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.linear import identity
from nngeom.core.statistic import Named
from nngeom.pmat.block import EyeBlock
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Recipe, Selection
from nngeom.space.collection import LayerCollection
from nngeom.sweep.sweep import Chunk


class PMatEye(PMat):
    """``c`` times the identity; measured, ``c`` is the mean of the diagonal, so that the trace is exact."""

    projects = True

    @staticmethod
    def build(
        layer_collection: LayerCollection,
        scale: float | Tensor = 1.0,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> PMatEye:
        """``scale * I`` over ``layer_collection`` without any data; the graph of a 0-d tensor ``scale`` is kept.

        ``dtype`` and ``device`` are torch's defaults unless given. Raises :class:`ArgumentError` for a ``scale`` that
        is not one finite number.
        """
        c = torch.as_tensor(scale, dtype=dtype or torch.get_default_dtype(), device=device).clone()
        if c.ndim or not torch.isfinite(c):
            raise ArgumentError(f"scale is {scale}; expected a finite number")
        span = layer_collection.span()
        return PMatEye.of_blocks(layer_collection, {span: EyeBlock(c, *span.sizes)}, 0)

    def terms(self) -> list[tuple[float | Tensor, Callable[[Tensor], Tensor]]]:
        match list(self.blocks.values()):
            case [EyeBlock(c=c)]:
                return [(c, identity)]
        return super().terms()

    @classmethod
    def recipe(cls, selection: Selection) -> Recipe:
        span = selection.span()

        def statistic(chunk: Chunk) -> Named:
            traces = [j.squared_norms().sum() for j in chunk.jacobians.values()]
            return {span: {"trace": torch.stack(traces).sum()}} if traces else {}

        means = yield statistic
        return {layout: EyeBlock(t["trace"] / layout.numel, *layout.sizes) for layout, t in means.items()}

    @classmethod
    def entries_of(cls, layout: Layout, rows: LayerJacobian | None, selection: Selection, **options: Any) -> int | None:
        return 1  # for all blocks
