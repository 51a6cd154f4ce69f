"""Products with the gradient of a batch through the rows of its examples, ``(D L)^T (A R)``, where that is cheaper.

The gradient ``V = D^T A`` of a linear layer has the rank ``r`` of the batch: ``L^T V R`` takes ``r (o p + i q + p q)``
multiplications through the rows and ``o i p + i p q`` through ``V``, for ``L [o, p]``, ``R [i, q]``. The rows are used
only where ``V`` was found to be a multiple of ``D^T A``: what else was added to it, or left out, shows in its products
with random vectors, and then ``V`` is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.factored import FactoredJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.sweep.sweep import Chunk

WORTH = 2e6  # multiplications below which keeping rows takes longer than it saves
COPIED = 8  # multiplications in the time that one entry of the rows takes to be copied
ROUNDINGS = 64  # by which V and D^T A may differ, each being a sum over the batch


def product(left: Tensor | None, x: Tensor, right: Tensor | None) -> Tensor:
    """``left^T x right`` of dense factors ``[s, o, p]``, ``[s, i, q]``, diagonal ones or ``None``, the identity."""
    return linalg.right(linalg.left(left, x, transpose=True), right)


class BatchRank:
    """The rows of the batches seen since the last step, of the layers where they are worth it."""

    def __init__(self, *, on: bool = True) -> None:
        """``on``: whether rows can be all of the gradient's: not those of a metric, nor of one process of several."""
        self.on = on
        self.rows: dict[Layout, list[FactoredJacobian]] = {}
        self.cheaper: dict[Layout, bool] = {}
        self.wanted = False

    def forget(self) -> None:
        """A step was taken, or left out; which layers are worth it is kept."""
        self.rows = {}

    def observe(self, chunk: Chunk) -> None:
        """Keep the rows of one chunk; counted where all cotangents are in it."""
        saved = 0.0
        if not self.on:
            return
        for layout, j in chunk.jacobians.items():
            count = self._saved(j)
            saved += count
            self.cheaper[layout] = count > 0
            if count > 0 and isinstance(j, FactoredJacobian):
                self.rows.setdefault(layout, []).append(j)
        self.wanted = saved > WORTH

    @staticmethod
    def _saved(j: LayerJacobian) -> float:
        """Multiplications saved of ``L^T V R`` with square factors, less those that copying the inputs would be."""
        if type(j) is not FactoredJacobian or j.g.shape[0] != 1 or j.shape[2] != 1:
            return -float(COPIED * j.shape[1] * getattr(j, "positions", 1) * j.shape[-1])
        _, n, _, o, i = j.shape
        r = n * j.positions
        return float(o * i * (o + i) - r * (o * o + i * i + o * i) - COPIED * r * i)

    def product(self, layout: Layout, left: Tensor | None, x: Tensor, right: Tensor | None) -> Tensor:
        """``left^T x right`` of the gradient ``x [1, o, i]`` of a block, with square factors."""
        if layout not in self.rows:
            return product(left, x, right)
        dense = (
            left is not None and right is not None and not linalg.is_diagonal(left) and not linalg.is_diagonal(right)
        )
        rows = self.of(layout, x) if dense else None
        if rows is None:
            return product(left, x, right)
        d, a = rows
        return ((d @ left[0]).mT @ (a @ right[0])).unsqueeze(0)  # type: ignore[index]

    def of(self, layout: Layout, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """``D [r, o]``, ``A [r, i]`` with ``D^T A = x``; ``None`` where they are not cheaper, or that is not so."""
        held = self.rows.get(layout, ())
        r, (o, i) = sum(j.g.shape[1] * j.positions for j in held), x.shape[1:]
        if not held or r * (o * o + i * i + o * i) >= o * i * (o + i):
            return None
        d = torch.cat([j.g.flatten(0, 3) for j in held]).to(x.dtype)
        a = torch.cat([j.a.flatten(0, 2) for j in held]).to(x.dtype)
        z = _probes(i, x)
        expected, found = x[0] @ z, d.mT @ (a @ z)
        scale = (expected * found).sum() / found.square().sum()
        error = (expected - scale * found).norm() / expected.norm()
        if not bool(error <= ROUNDINGS * torch.finfo(x.dtype).eps):  # NaN of zeros too
            return None
        return d * scale, a


def _probes(i: int, like: Tensor) -> Tensor:
    """Two random vectors, the same in every step."""
    z = torch.randn(i, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    return z.to(like)
