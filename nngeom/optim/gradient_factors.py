"""Kronecker factors of the gradients of batches, in place of those of the rows of examples (Gupta et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.optim.averages import Averages
from nngeom.optim.pending import Seen
from nngeom.pmat.factors import factor_shapes, is_kronecker, structure_of
from nngeom.pmat.long_factors import FACTOR_LIMIT
from nngeom.sweep.sweep import Chunk


class GradientFactors:
    """``G = n V V^T`` and ``A = V^T V / |V|^2`` of gradients ``V`` of the mean loss over ``n`` examples, so that the
    trace of ``A (x) G`` is that of EKFAC-ra's second moments, ``n |V|^2``.

    Which are whole is read off the rows of the first batch: of parameters without Kronecker structure (norms, scales, a
    recurrent cell) neither is, as in the paper's experiments, of lookups that of outputs, and none above a limit.
    """

    def __init__(self) -> None:
        self.dense: dict[Layout, tuple[bool, bool]] = {}

    def observe(self, chunk: Chunk) -> None:
        """Learn the structure of the rows."""
        for layout, j in chunk.jacobians.items():
            if layout not in self.dense:
                self.dense[layout] = _whole(j)

    def recall(self, averages: Averages) -> None:
        """Take the structure from ``averages`` of factors."""
        self.dense = {lay: (t["a"].ndim == 3, t["g"].ndim == 3) for lay, (_, t) in averages.entries.items()}

    def knows(self, names: Sequence[str]) -> bool:
        """Whether the structure of all parameters of these names is learnt."""
        return {name for layout in self.dense for name in layout.names}.issuperset(names)

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


def _whole(j: LayerJacobian) -> tuple[bool, bool]:
    """Whether the factors of inputs and of outputs are, for the rows ``j``: in all their uses."""
    shapes = factor_shapes(j, FACTOR_LIMIT) if is_kronecker(structure_of(j)) else []
    a, g = (bool(shapes) and all(len(pair[side]) == 3 for pair in shapes) for side in (0, 1))
    return a, g
