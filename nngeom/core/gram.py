"""Products of gradients of all pairs of examples, added up layer by layer without keeping any layer's rows.

Three ways, the cheapest by count:

* no positions: ``(a a^T) * (g g^T)``;
* pairs of positions: ``sum_tu (a_t . a_u) (g_t . g_u)``, inputs against inputs, then gradients ``g_u``, then ``g_t``;
* rows: a block of the rows ``[o, i]`` at a time, small enough to stay in a processor cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nngeom.core import linalg, memory

if TYPE_CHECKING:
    from nngeom.core.factored import FactoredJacobian
    from nngeom.core.jacobian import LayerJacobian

SLICE_BYTES = 2**23
LEAST_ROWS = 64  # of a strip: a product of fewer runs badly
LOOPED = 16  # output features from which products of one cotangent at a time run well


class Tile:
    """The sum ``out[k, n, l, m]`` of the products of two sets of rows, in strips of ``(k, n)``.

    Of two times the same rows, strips begin at the diagonal: about half of the work; :meth:`result` mirrors them. All
    layers share one piece of working memory.
    """

    def __init__(self, x: LayerJacobian, y: LayerJacobian):
        (self.k, self.n), (self.l, self.m) = x.shape[:2], y.shape[:2]
        self.symmetric = x is y
        self.out = torch.zeros(self.k, self.n, self.l, self.m, dtype=linalg.accumulation_dtype(x.dtype), device=x.device)
        self._working = memory.Working()

    def working(self, name: str, *sizes: int) -> Tensor:
        """Uninitialised memory that the next call with the same name overwrites."""
        return self._working(name, sizes, self.out)

    def strips(self) -> Iterator[tuple[slice, slice, slice, slice]]:
        """``(k, n, l, m)`` of every strip: some outputs of all examples or, of one output, some examples."""
        several = self.k > 1
        count, each = (self.k, self.n) if several else (self.n, 1)
        step = max(1, -(-count // 16), LEAST_ROWS // each)
        for lo in range(0, count, step):
            own, rest, every = slice(lo, min(count, lo + step)), slice(lo if self.symmetric else 0, None), slice(None)
            yield (own, every, rest, every) if several else (every, own, every, rest)

    def add(self, x: Tensor, y: Tensor) -> None:
        """``out[k, n, l, m] += <x[k n], y[l m]>`` for explicit rows ``x [k n, p]``, ``y [l m, p]``."""
        out = self.out.view(self.k * self.n, self.l * self.m)
        for lo, hi, first in self._flat():
            out[lo:hi, first:].addmm_(x[lo:hi], y[first:].T)

    def _flat(self) -> Iterator[tuple[int, int, int]]:
        """``(lo, hi, first)`` of every strip: rows ``lo .. hi - 1``, columns from ``first``."""
        for k, n, l, m in self.strips():
            if self.k > 1:
                yield k.start * self.n, k.stop * self.n, l.start * self.m
            else:
                yield n.start, n.stop, m.start

    def add_scaled(self, x: Tensor, y: Tensor, scale: Tensor) -> None:
        """``out[k, n, l, m] += scale[n, m] <x[k, n], y[l, m]>`` for rows ``x [k, n, p]``, ``y [l, m, p]``."""
        for k, n, l, m in self.strips():
            part = self.out[k, n, l, m]
            sizes = part.shape
            left, right = x[k, n].flatten(0, 1), y[l, m].flatten(0, 1)
            products = torch.mm(left, right.T, out=self.working("products", len(left), len(right)))
            part.addcmul_(products.view(sizes), scale[n, m].unsqueeze(1))

    def result(self) -> Tensor:
        """``[k, n, l, m]``, with the part below the strips filled in."""
        if self.symmetric:
            out = self.out.view(self.k * self.n, -1)
            for lo, hi, _ in self._flat():
                out[hi:, lo:hi] = out[lo:hi, hi:].T
        return self.out


def by_rows(tile: Tile, x: LayerJacobian, y: LayerJacobian) -> None:
    """Explicit rows of both sides, a block of the parameters of the layer at a time, about as many outputs as inputs: small products run badly."""
    k, n, s, o, i = x.shape
    rows = n * k + (0 if x is y else y.shape[0] * y.shape[1])
    most = min(SLICE_BYTES, memory.budget() // 4) // (rows * x.dtype.itemsize)  # parameters of a block
    both = s == 1 and x.cuts_inputs and y.cuts_inputs
    height = s if s > 1 else o
    width = min(i, max(1, math.isqrt(most), most // o)) if both else i
    step = max(1, min(height, most // (width * (o if s > 1 else 1))))
    for lo in range(0, height, step):
        left, right = (z.features(lo, min(height, lo + step)) for z in (x, y))
        for first in range(0, i, width):
            cut = left if width == i else left.inputs(first, min(i, first + width))
            part = cut.all_rows(tile.working, "left")
            if x is not y:
                cut = right if width == i else right.inputs(first, min(i, first + width))
            tile.add(part, part if x is y else cut.all_rows(tile.working, "right"))


def without_positions(tile: Tile, x: FactoredJacobian, y: FactoredJacobian) -> None:
    """``sum_s (a a^T) * (g g^T)``: no rows at all."""
    for s in range(x.g.shape[3]):
        tile.add_scaled(x.g[:, :, 0, s], y.g[:, :, 0, s], x.input_gram(y, s)[:, 0, :, 0])


def by_positions(tile: Tile, x: FactoredJacobian, y: FactoredJacobian) -> None:
    """``sum_s,t,u (a_t . a_u) (g_t . g_u)``, one example of the left side at a time against blocks of the right."""
    (k, n, t, groups, o), (l, m, u, _, _) = x.g.shape, y.g.shape
    size = memory.step(m, l * o * t * x.g.element_size(), most=min(SLICE_BYTES // 4, memory.budget() // 4))
    for s in range(groups):
        g = x.g[:, :, :, s].permute(1, 0, 3, 2).reshape(n, k, o * t)
        h = (g if x is y else y.g[:, :, :, s].permute(1, 0, 3, 2)).reshape(m, l * o, u)
        for j in range(n):
            one = x.examples(j, j + 1)
            for lo in range(j if x is y else 0, m, size):
                hi = min(m, lo + size)
                inner = y.examples(lo, hi).input_gram(one, s)[:, :, 0]  # [m u t]
                mixed = torch.bmm(h[lo:hi], inner, out=tile.working("mixed", hi - lo, l * o, t)).view((hi - lo) * l, o * t)
                part = (mixed @ g[j].T).view(hi - lo, l, k)
                tile.out[:, j, :, lo:hi] += part.permute(2, 1, 0)
                if x is y:  # pairs of examples once, of outputs all: the mirror image belongs to other strips
                    later = max(lo, j + 1)
                    tile.out[:, later:hi, :, j] += part[later - lo :].permute(1, 0, 2)


def positions_are_cheaper(x: FactoredJacobian, y: FactoredJacobian) -> bool:
    """Whether pairs of positions beat rows: multiply-adds of one pair of examples, weighted by how well each step runs."""
    (k, n, t, _, o), (l, m, u, _, _) = x.g.shape, y.g.shape
    i = x.shape[-1]
    half = 0.5 if x is y else 1.0
    rows = half * 1.1 * k * l * o * i + 1.5 * o * i * (k * max(t, 10) / m + (0 if x is y else l * max(u, 10) / n))
    pairs = half * (x.a_width * t * u + 1.6 * t * u * l * o + 3.5 * k * l * t * o)
    return pairs < rows


def add_factored(tile: Tile, x: FactoredJacobian, y: FactoredJacobian) -> None:
    """The cheapest of the three."""
    if x.positions == y.positions == 1:
        without_positions(tile, x, y)
    elif positions_are_cheaper(x, y):
        by_positions(tile, x, y)
    else:
        by_rows(tile, x, y)


def squared_norms(g: Tensor, a: Tensor) -> Tensor:
    """``sum_s |sum_t g_t (x) a_t|**2`` as ``[k, n]``: by pairs of positions ``sum_tu (a_t . a_u) (g_t . g_u)``, or by rows."""
    k, n, t, s, o = g.shape
    i = a.shape[-1]
    by_pairs = t * t * (k * (o + 4) + i) < k * o * i * (t + 4)
    if g.requires_grad or a.requires_grad:  # with a graph, every slice costs a gradient of the whole
        return _pieces_of_norms(g, a, by_pairs)
    together = k if o < LOOPED else 1
    each = together * s * (t * t if by_pairs else o * i) * g.element_size()
    parts = [_pieces_of_norms(g[:, lo:hi], a[lo:hi], by_pairs, together) for lo, hi in memory.pieces(n, each, most=memory.CACHE_BYTES // 2)]
    return torch.cat(parts, 1)


def _pieces_of_norms(g: Tensor, a: Tensor, by_pairs: bool, together: int | None = None) -> Tensor:
    inputs = a.transpose(1, 2)  # [n s t i]
    inner = inputs @ inputs.mT if by_pairs else None
    rows = []
    for h in g.split(together) if together else (g,):
        h = h.permute(1, 0, 3, 2, 4)  # [n k s t o]
        rows.append(((h @ h.mT) * inner.unsqueeze(1)).sum((2, 3, 4)).T if inner is not None else _norms(h, inputs))
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _norms(h: Tensor, inputs: Tensor) -> Tensor:
    """``|h^T a|**2`` for ``h [n, k, s, t, o]``, ``a [n, s, t, i]``: all cotangents of an example in one product."""
    n, k, s, t, o = h.shape
    if k == 1:
        rows = (h.squeeze(1).mT @ inputs).flatten(1)  # [n, s o i]
        return torch.linalg.vecdot(rows, rows).unsqueeze(0)
    rows = h.permute(0, 2, 1, 4, 3).reshape(n, s, k * o, t) @ inputs
    rows = rows.view(n, s, k, -1)
    return torch.linalg.vecdot(rows, rows).sum(1).T
