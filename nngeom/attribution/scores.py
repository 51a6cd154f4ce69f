"""Scores as they come, a block of queries and training examples at a time, and what is kept of them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from nngeom.core import costs, memory, pairs
from nngeom.core.factored import FactoredJacobian
from nngeom.core.jacobian import FullJacobian, LayerJacobian, tensors
from nngeom.core.tile import Tile
from nngeom.fmat.store import Store


def add_scores(out: Tensor, left: LayerJacobian, right: LayerJacobian) -> None:
    """``out[j, i] += <left[0, j], right[0, i]>`` in place."""
    few = len(out) < costs.QUERIES
    if isinstance(left, FullJacobian) and type(right) is FactoredJacobian and right.positions == 1 and few:
        _add_inputs_first(out, left.m[0], right)
    elif isinstance(left, FullJacobian) and type(right) not in (FullJacobian, FactoredJacobian):
        each = sum(t.numel() for t in tensors(right)) // len(out[0]) * len(out) * out.element_size()
        for lo, hi in memory.pieces(len(out[0]), each, most=memory.CACHE_BYTES):
            out[:, lo:hi] += right.examples(lo, hi).jvp(left.m[0])[:, 0]
    else:
        tile = Tile(left, right)
        pairs.add(tile, left, right)
        out += tile.result()[0, :, 0]


def _add_inputs_first(out: Tensor, p: Tensor, right: FactoredJacobian) -> None:
    """``out[j, i] += sum_s g[i, s]^T p[j, s] a[i, s]`` for explicit ``p [q, s, o, i]``, as many examples at a time as
    leave what lies between in a processor cache.
    """
    q, groups, o, _ = p.shape
    a, g = right.a[:, 0], right.g[0, :, 0]
    for lo, hi in memory.pieces(len(a), q * o * p.dtype.itemsize, most=memory.CACHE_BYTES):
        for s in range(groups):
            between = (p[:, s].flatten(0, 1) @ a[lo:hi, s].T).view(q, o, hi - lo)
            out[:, lo:hi] += torch.einsum("qon,no->qn", between, g[lo:hi, s])


class Keeper(Protocol):
    """What is kept of scores."""

    def result(self) -> Any:
        """What was kept, when all is done."""

    def has(self, j: slice, i: slice) -> bool:
        """Whether the scores of queries ``j`` and examples ``i`` are known."""

    def keep(self, j: slice, i: slice, scores: Tensor) -> None:
        """Keep what is wanted of them."""


class Everything:
    """All scores, ``(q, n)``: one block of columns a chunk, put together at the end."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, Tensor]] = {}

    def has(self, j: slice, i: slice) -> bool:
        return False

    def keep(self, j: slice, i: slice, scores: Tensor) -> None:
        self._rows.setdefault(j.start, {})[i.start] = scores

    def result(self) -> Tensor:
        """``(q, n)``."""
        rows = []
        for start in sorted(self._rows):
            parts = self._rows.pop(start)
            rows.append(torch.cat([parts[at] for at in sorted(parts)], 1))
        return torch.cat(rows) if len(rows) > 1 else rows[0]


class Largest:
    """The ``k`` largest scores of every query, and of which examples."""

    def __init__(self, k: int):
        self.k = k
        self._best: dict[int, tuple[Tensor, Tensor]] = {}

    def has(self, j: slice, i: slice) -> bool:
        return False

    def keep(self, j: slice, i: slice, scores: Tensor) -> None:
        places = torch.arange(i.start, i.stop, device=scores.device).expand_as(scores)
        if j.start in self._best:
            values, before = self._best[j.start]
            scores, places = torch.cat([values, scores], 1), torch.cat([before, places], 1)
        values, at = scores.topk(min(self.k, scores.shape[1]), 1)
        self._best[j.start] = values, places.gather(1, at)

    def result(self) -> tuple[Tensor, Tensor]:
        """``(q, k)`` both, in descending order."""
        found = [self._best[start] for start in sorted(self._best)]
        return torch.cat([values for values, _ in found]), torch.cat([at for _, at in found])


class InFile:
    """All scores, in the file of a store that has begun."""

    def __init__(self, store: Store):
        self.store = store

    def has(self, j: slice, i: slice) -> bool:
        return self.store.has((j, i))

    def keep(self, j: slice, i: slice, scores: Tensor) -> None:
        self.store.write((j, i), {"": scores}, None, lambda tile: tile)

    def result(self) -> Tensor | None:
        """``(q, n)``, mapped from the file; ``None`` of a part of it."""
        return self.store.result().get("")
