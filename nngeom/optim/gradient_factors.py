"""Kronecker factors of the gradients of batches, in place of those of the rows of examples (Gupta et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core.errors import StructureError
from nngeom.core.layout import Layout
from nngeom.optim.averages import Averages
from nngeom.optim.pending import Seen
from nngeom.pmat.factors import factor_shapes
from nngeom.pmat.kfac import has_room
from nngeom.pmat.long_factors import FACTOR_LIMIT
from nngeom.sweep.sweep import Chunk


class GradientFactors:
    """``G = n V V^T`` and ``A = V^T V / |V|^2`` of gradients ``V`` of the mean loss over ``n`` examples, so that the
    trace of ``A (x) G`` is that of EKFAC-ra's second moments, ``n |V|^2``.

    Which factors are diagonal is read off the rows of the first batch: those of lookups, and those above the limit.
    """

    def __init__(self) -> None:
        self.dense: dict[Layout, tuple[bool, bool]] = {}

    def observe(self, chunk: Chunk) -> None:
        """Learn the structure of the rows."""
        for layout, j in chunk.jacobians.items():
            if layout not in self.dense:
                shapes = factor_shapes(j, FACTOR_LIMIT)
                if len(shapes) != 1 or not has_room(j, FACTOR_LIMIT):
                    raise StructureError(
                        f"parameters {list(layout.names)[:4]} have no single Kronecker structure; use factors='rows'"
                    )
                a, g = shapes[0]
                self.dense[layout] = (len(a) == 3, len(g) == 3)

    def take(self, averages: Averages, gradient: Tensor, seen: Seen, decay: float) -> None:
        """Those of the ``gradient [d]`` into the running averages."""
        means = {}
        for layout, (dense_a, dense_g) in self.dense.items():
            v = layout.gather(gradient) * seen.mean
            size = v.square().sum((-1, -2), keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
            a = v.mT @ v if dense_a else v.square().sum(-2)
            g = v @ v.mT if dense_g else v.square().sum(-1)
            means[layout] = {"a": a / (size if dense_a else size.squeeze(-1)), "g": seen.examples * g}
        averages.update(means, decay)
