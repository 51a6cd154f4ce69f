"""Products of gradients of all pairs of examples, added up layer by layer without keeping any layer's rows.

Three ways, the cheapest by count:

* no positions: ``(a a^T) * (g g^T)``;
* pairs of positions: ``sum_tu (a_t . a_u) (g_t . g_u)``, inputs against inputs, then gradients ``g_u``, then ``g_t``;
* rows: a block of the rows ``[o, i]`` at a time, small enough to stay in a processor cache.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nngeom.core import linalg, memory

if TYPE_CHECKING:
    from nngeom.core.factored import FactoredJacobian
    from nngeom.core.jacobian import LayerJacobian

SLICE_BYTES = 3 * 2**21  # of rows in working memory: larger ones leave the cache, smaller ones make small products
LEAST_ROWS = 64  # of a strip: a product of fewer runs badly
NARROW = 32  # columns of a product below which it runs badly
LOOPED = 16  # output features from which products of one cotangent at a time run well


class Tile:
    """The sum ``out[k, n, l, m]`` of the products of two sets of rows.

    Rows lie in memory by outputs, ``(k n)``, or ``by_examples``, ``(n k)``: so rows summed over positions are formed
    for all outputs of an example in one product. Of two times the same rows, only what lies above the diagonal is
    complete, about half of the work, until :meth:`result` mirrors it. All layers share one piece of working memory.
    """

    def __init__(self, x: LayerJacobian, y: LayerJacobian, by_examples: bool = False):
        (self.k, self.n), (self.l, self.m) = x.shape[:2], y.shape[:2]
        self.symmetric, self.by_examples = x is y, by_examples or self.k == 1
        self.flat = torch.zeros(
            self.k * self.n, self.l * self.m, dtype=linalg.accumulation_dtype(x.dtype), device=x.device
        )
        self._working = memory.Working()

    def working(self, name: str, *sizes: int) -> Tensor:
        """Uninitialised memory that the next call with the same name overwrites."""
        return self._working(name, sizes, self.flat)

    @property
    def out(self) -> Tensor:
        """``[k, n, l, m]``, in whichever order it lies."""
        if self.by_examples:
            return self.flat.view(self.n, self.k, self.m, self.l).permute(1, 0, 3, 2)
        return self.flat.view(self.k, self.n, self.l, self.m)

    def take(self, x: LayerJacobian, y: LayerJacobian) -> None:
        """Add the products of one block; in the widest dtype of all blocks."""
        wide = torch.promote_types(self.flat.dtype, torch.promote_types(x.dtype, y.dtype))
        self.flat = self.flat.to(wide)
        if not x.dtype == y.dtype == wide:
            x, y = (x.to(wide),) * 2 if x is y else (x.to(wide), y.to(wide))
        x.add_gram(self, y)

    def rows(self, x: Tensor) -> Tensor:
        """``[k, n, *p] -> [r, p]``, in the order of the tile."""
        return (x.transpose(0, 1) if self.by_examples else x).flatten(2).flatten(0, 1)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Products of explicit rows ``x [r, p]``, ``y [q, p]``, in the order of the tile."""
        for lo, hi in linalg.strips(len(x)) if self.symmetric else ((0, len(y)),):
            last = hi if self.symmetric else len(x)
            self.flat[:last, lo:hi].addmm_(x[:last], y[lo:hi].T)

    def add_scaled(self, x: Tensor, y: Tensor, scale: Tensor) -> None:
        """``out[k, n, l, m] += scale[n, m] <x[k, n], y[l, m]>`` for rows ``x [k, n, p]``, ``y [l, m, p]``."""
        left, right = self.rows(x), self.rows(y)
        inner, across = (self.k, self.l) if self.by_examples else (self.n, self.m)
        step = (
            max(-(-len(left) // inner // 16), -(-LEAST_ROWS // inner)) * inner
        )  # some outputs of all examples, or all of some
        for lo in range(0, len(left), step):
            hi, first = min(len(left), lo + step), lo // inner * across if self.symmetric else 0
            products = torch.mm(left[lo:hi], right[first:].T, out=self.working("products", hi - lo, len(right) - first))
            part = self.flat[lo:hi, first:].unflatten(1, (-1, across)).unflatten(0, (-1, inner))
            factor = scale[lo // inner : hi // inner, first // across :, None] if self.by_examples else scale
            part.addcmul_(products.view(part.shape), factor.unsqueeze(1))

    def result(self) -> Tensor:
        """``[k, n, l, m]``, with the part below the diagonal filled in."""
        self._working = memory.Working()
        if self.symmetric:
            linalg.mirror_(self.flat, corners=True)
        return self.out.contiguous()


def _width(o: int, i: int, most: int) -> int:
    """Inputs in a block of ``most`` parameters: those that leave all outputs together, all, or about as many as
    outputs.
    """
    square = math.isqrt(most)
    width = most // o if most // o >= NARROW else i if i <= 2 * square else max(1, square)
    return -(-i // -(-i // width))


def by_rows(tile: Tile, x: LayerJacobian, y: LayerJacobian) -> None:
    """Explicit rows of both sides, a block of the parameters of the layer at a time."""
    k, n, s, o, i = x.shape
    rows = n * k + (0 if x is y else y.shape[0] * y.shape[1])
    most = min(SLICE_BYTES, memory.budget() // 4) // (rows * x.dtype.itemsize)  # parameters of a block
    both = s == 1 and x.cuts_inputs and y.cuts_inputs
    height = s if s > 1 else o
    width = _width(o, i, most) if both else i
    step = max(1, min(height, most // (width * (o if s > 1 else 1))))
    for lo in range(0, height, step):
        left, right = (z.features(lo, min(height, lo + step)) for z in (x, y))
        for first in range(0, i, width):
            cut = left if width == i else left.inputs(first, min(i, first + width))
            part = cut.all_rows(tile, "left")
            if x is not y:
                cut = right if width == i else right.inputs(first, min(i, first + width))
            tile.add(part, part if x is y else cut.all_rows(tile, "right"))


def without_positions(tile: Tile, x: FactoredJacobian, y: FactoredJacobian) -> None:
    """``sum_s (a a^T) * (g g^T)``: no rows at all."""
    for s in range(x.g.shape[3]):
        tile.add_scaled(x.g[:, :, 0, s], y.g[:, :, 0, s], x.input_gram(y, s)[:, 0, :, 0])


def by_positions(tile: Tile, x: FactoredJacobian, y: FactoredJacobian) -> None:
    """``sum_s,t,u (a_t . a_u) (g_t . g_u)``, a block of the right side at a time against one example of the left after
    the other.
    """
    (k, n, t, groups, o), (l, m, u, _, _) = x.g.shape, y.g.shape
    most = min(SLICE_BYTES, memory.budget()) // 4
    size = memory.step(m, l * o * t * x.dtype.itemsize, most=most)
    across = memory.step(n, size * t * u * x.dtype.itemsize, most=most)
    for s, lo in itertools.product(range(groups), range(0, m, size)):
        hi = min(m, lo + size)
        h = y.g[:, lo:hi, :, s].permute(1, 0, 3, 2).reshape(hi - lo, l * o, u)
        for j in range(hi if x is y else n):  # pairs of examples once
            first, place = max(lo, j) if x is y else lo, j % across
            if not place:
                inner = y.examples(lo, hi).input_gram(x.examples(j, min(n, j + across)), s)  # [m u n t]
            mixed = torch.bmm(
                h[first - lo :], inner[first - lo :, :, place], out=tile.working("mixed", hi - first, l * o, t)
            )
            g = x.g[:, j, :, s].mT.reshape(k, o * t)
            part = (g @ mixed.view((hi - first) * l, o * t).T).view(k, hi - first, l).transpose(1, 2)
            tile.out[:, j, :, first:hi] += part
            if x is y and not tile.by_examples:  # the mirror image belongs above the diagonal too
                later = max(first, j + 1)
                tile.out[:, later:hi, :, j] += part[:, :, later - first :].permute(1, 2, 0)


def positions_are_cheaper(x: FactoredJacobian, y: FactoredJacobian) -> bool:
    """Whether pairs of positions beat rows: multiply-adds of one pair of examples, weighted by how well each step
    runs.
    """
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
    """``sum_s |sum_t g_t (x) a_t|**2`` as ``[k, n]``: by pairs of positions ``sum_tu (a_t . a_u) (g_t . g_u)``, or by
    rows.
    """
    k, n, t, s, o = g.shape
    i = a.shape[-1]
    by_pairs = t * t * (k * (o + 4) + i) < k * o * i * (t + 4)
    if g.requires_grad or a.requires_grad:  # with a graph, every slice costs a gradient of the whole
        return _pieces_of_norms(g, a, by_pairs)
    together = k if o < LOOPED else 1
    each = together * s * (t * t if by_pairs else o * i) * g.element_size()
    parts = [
        _pieces_of_norms(g[:, lo:hi], a[lo:hi], by_pairs, together)
        for lo, hi in memory.pieces(n, each, most=memory.CACHE_BYTES // 2)
    ]
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
