"""Products with the gradient of a batch through the rows of its examples, ``(D L)^T (A R)``, where that is cheaper.

The gradient ``V = D^T A`` of a linear layer has the rank ``r`` of the batch: ``L^T V R`` takes ``r (o p + i q + p q)``
multiplications through the rows and ``o i p + i p q`` through ``V``, for ``L [o, p]``, ``R [i, q]``. The rows are used
only where ``V`` was found to be a multiple of ``D^T A``: what else was added to it, or left out, shows in its products
with random vectors, and then ``V`` is used.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.factored import FactoredJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.optim.averages import plain_block, restored_block
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
        self.count: dict[Layout, int] = {}  # of the rows of the last batch
        self.wanted = False

    def forget(self) -> None:
        """A step was taken, or left out; which layers are worth it is kept."""
        self.rows = {}

    def state(self) -> dict[str, Any]:
        """What decides which way the coming products are computed, as plain values."""
        return {"wanted": self.wanted, "count": [[plain_block(layout), n] for layout, n in self.count.items()]}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.wanted = state["wanted"]
        self.count = {restored_block(layout): n for layout, n in state["count"]}

    def observe(self, chunk: Chunk) -> None:
        """Keep the rows of one chunk; counted where all cotangents are in it."""
        saved = 0.0
        if not self.on:
            return
        for layout, j in chunk.jacobians.items():
            count = self._saved(j)
            saved += count
            if count > 0 and isinstance(j, FactoredJacobian):
                self.rows.setdefault(layout, []).append(j)
                self.count[layout] = sum(map(_count, self.rows[layout]))
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

    def pays(self, layout: Layout, costs: tuple[int, int]) -> bool:
        """Whether rows as many as the last ones are cheaper, where those of products with one row on either side are
        ``costs``.
        """
        _, o, i = layout.sizes
        return layout in self.count and self.count[layout] * (sum(costs) + o * i) < i * costs[0] + o * costs[1]

    def of(self, layout: Layout, x: Tensor, costs: tuple[int, int] | None = None) -> tuple[Tensor, Tensor] | None:
        """``D [r, o]``, ``A [r, i]`` with ``D^T A = x``; ``None`` where they are not cheaper, or that is not so.

        ``costs``: multiplications of one row's products with what stands left and right; default: of square factors.
        """
        held, (o, i) = self.rows.get(layout, ()), x.shape[1:]
        if not held or not self.pays(layout, costs or (o * o, i * i)):
            return None
        d, a = _joined([j.g.flatten(0, 3) for j in held], x), _joined([j.a.flatten(0, 2) for j in held], x)
        probes = _probes(i, x.dtype, x.device)  # one by one: products with thin matrices are slow
        expected, found = torch.cat([x[0] @ z for z in probes]), torch.cat([d.mT @ (a @ z) for z in probes])
        scale = (expected * found).sum() / found.square().sum()
        error = (expected - scale * found).norm() / expected.norm()
        if not bool(error <= ROUNDINGS * torch.finfo(x.dtype).eps):  # NaN of zeros too
            return None
        return d * scale, a


def _count(j: FactoredJacobian) -> int:
    return j.g.shape[1] * j.positions


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(like.dtype)


@functools.lru_cache(64)
def _probes(i: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two random vectors, the same in every step."""
    z = torch.randn(2, i, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    return z[0].to(device, dtype), z[1].to(device, dtype)
