"""Products of gradients of all pairs of examples, added up layer by layer without keeping any layer's rows.

Everything is added to one array ``out[n, k, m, l]``, examples first, so that blocks of examples are blocks of a matrix.
For two times the same examples only ``m >= n`` is promised: half of the work. Three ways, the cheapest by count:

* no positions: ``(a a^T) * (g g^T)``;
* pairs of positions: ``sum_tu (a_t . a_u) (g_t . g_u)``, inputs against inputs, then gradients ``g_u``, then ``g_t``;
* rows: the rows ``[o, i]`` of a slice of outputs features at a time, small enough to stay in a processor cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nngeom.core import memory

if TYPE_CHECKING:
    from nngeom.core.factored import FactoredJacobian
    from nngeom.core.jacobian import LayerJacobian

SLICE_BYTES = 2**23
BLOCKS = 8  # blocks of examples in which the half of a symmetric product is computed
LOOPED = 16  # output features from which products of one cotangent at a time run well


def add_product(out: Tensor, x: Tensor, y: Tensor, symmetric: bool) -> None:
    """``out[n, k, m, l] += <x[n k], y[m l]>`` for explicit rows ``x [n k, p]``, ``y [m l, p]``."""
    n, k, m, l = out.shape
    flat = out.view(n * k, m * l)
    for lo, hi in blocks(n, symmetric):
        first = lo * l if symmetric else 0
        flat[lo * k : hi * k, first:].addmm_(x[lo * k : hi * k], y[first:].T)


def blocks(n: int, symmetric: bool) -> Iterator[tuple[int, int]]:
    """Ranges of examples whose products with all later ones are computed together."""
    step = -(-n // BLOCKS) if symmetric else n
    for lo in range(0, n, max(1, step)):
        yield lo, min(n, lo + step)


def by_rows(out: Tensor, x: LayerJacobian, y: LayerJacobian) -> None:
    """Explicit rows of both sides, a slice of the parameters of the layer at a time."""
    k, n, s, o, i = x.shape
    rows = n * k + (0 if x is y else y.shape[0] * y.shape[1])
    most = min(SLICE_BYTES, memory.budget() // 4)
    for lo, hi in memory.pieces(s if s > 1 else o, rows * (o if s > 1 else 1) * i * x.dtype.itemsize, most=most):
        left = x.features(lo, hi).example_rows()
        add_product(out, left, left if x is y else y.features(lo, hi).example_rows(), x is y)


def without_positions(out: Tensor, x: FactoredJacobian, y: FactoredJacobian) -> None:
    """``sum_s (a a^T) * (g g^T)``: no rows at all."""
    (k, n, _, groups, o), (l, m) = x.g.shape, y.g.shape[:2]
    for s in range(groups):
        g = x.g[:, :, 0, s].transpose(0, 1).reshape(n * k, o)
        h = g if x is y else y.g[:, :, 0, s].transpose(0, 1).reshape(m * l, o)
        inner = x.input_gram(y, s).view(n, 1, m, 1)
        for lo, hi in blocks(n, x is y):
            first = lo if x is y else 0
            for at, to in memory.pieces(m - first, (hi - lo) * k * l * g.element_size(), most=memory.budget() // 4):
                part = slice(first + at, first + to)
                products = g[lo * k : hi * k] @ h[part.start * l : part.stop * l].T
                out[lo:hi, :, part].addcmul_(products.view(hi - lo, k, to - at, l), inner[lo:hi, :, part])


def by_positions(out: Tensor, x: FactoredJacobian, y: FactoredJacobian) -> None:
    """``sum_s,t,u (a_t . a_u) (g_t . g_u)``, one example of the left side at a time against blocks of the right."""
    (k, n, t, groups, o), (l, m, u, _, _) = x.g.shape, y.g.shape
    for s in range(groups):
        g = x.g[:, :, :, s].permute(1, 0, 3, 2).reshape(n, k, o * t)
        h = (g if x is y else y.g[:, :, :, s].permute(1, 0, 3, 2)).reshape(m, l * o, u)
        size = memory.step(m, l * o * t * g.element_size(), most=min(SLICE_BYTES // 4, memory.budget() // 4))
        buffer = g.new_empty(size, l * o, t)
        for j in range(n):
            one = x.examples(j, j + 1)
            for lo in range(j if x is y else 0, m, size):
                hi = min(m, lo + size)
                inner = y.examples(lo, hi).input_gram(one, s)[:, :, 0]  # [m u t]
                mixed = torch.bmm(h[lo:hi], inner, out=buffer[: hi - lo]).view((hi - lo) * l, o * t)
                out[j, :, lo:hi] += (mixed @ g[j].T).view(hi - lo, l, k).permute(2, 0, 1)


def positions_are_cheaper(x: FactoredJacobian, y: FactoredJacobian) -> bool:
    """Whether pairs of positions beat rows: multiply-adds of one pair of examples, weighted by how well each step runs."""
    (k, n, t, _, o), (l, m, u, _, _) = x.g.shape, y.g.shape
    i = x.shape[-1]
    half = 0.5 if x is y else 1.0
    rows = half * 1.1 * k * l * o * i + 1.5 * o * i * (k * max(t, 10) / m + (0 if x is y else l * max(u, 10) / n))
    pairs = half * (x.a_width * t * u + 1.6 * t * u * l * o + 3.5 * k * l * t * o)
    return pairs < rows


def add_factored(out: Tensor, x: FactoredJacobian, y: FactoredJacobian) -> None:
    """The cheapest of the three."""
    if x.positions == y.positions == 1:
        without_positions(out, x, y)
    elif positions_are_cheaper(x, y):
        by_positions(out, x, y)
    else:
        by_rows(out, x, y)


def mirrored(out: Tensor) -> Tensor:
    """``[k, n, l, m]`` from ``out[n, k, m, l]`` of which only ``m >= n`` is right."""
    n, k = out.shape[:2]
    flat = out.view(n * k, n * k)
    for lo, hi in blocks(n, True):
        a, b = lo * k, hi * k
        flat[b:, a:b] = flat[a:b, b:].T
        square = out[lo:hi, :, lo:hi]
        later = torch.ones(hi - lo, hi - lo, dtype=torch.bool, device=out.device).triu()[:, None, :, None]
        square.copy_(torch.where(later, square, square.permute(2, 3, 0, 1)))
    return out.permute(1, 0, 3, 2).contiguous()


def squared_norms(g: Tensor, a: Tensor) -> Tensor:
    """``sum_s |sum_t g_t (x) a_t|**2`` as ``[k, n]``: by pairs of positions ``sum_tu (a_t . a_u) (g_t . g_u)``, or by rows."""
    k, n, t, s, o = g.shape
    i = a.shape[-1]
    by_pairs = t * t * (k * (o + 4) + i) < k * o * i * (t + 4)
    together = k if o < LOOPED or g.requires_grad else 1  # with a graph, every slice costs a gradient of the whole
    each = together * s * (t * t if by_pairs else o * i) * g.element_size()
    parts = []
    for lo, hi in memory.pieces(n, each, most=None if g.requires_grad else memory.CACHE_BYTES // 2):
        inputs = a[lo:hi].transpose(1, 2)  # [n s t i]
        inner = inputs @ inputs.mT if by_pairs else None
        rows = []
        for h in g[:, lo:hi].split(together):
            h = h.transpose(2, 3)  # [k n s t o]
            rows.append(((h @ h.mT) * inner).sum((2, 3, 4)) if inner is not None else _norms(h, inputs))
        parts.append(torch.cat(rows))
    return torch.cat(parts, 1)


def _norms(h: Tensor, inputs: Tensor) -> Tensor:
    """``|h^T a|**2`` for ``h [k, n, s, t, o]``, ``a [n, s, t, i]``: all cotangents of an example in one product."""
    k, n, s, t, o = h.shape
    if k == 1:
        rows = (h[0].mT @ inputs).flatten(1)  # [n, s o i]
        return torch.linalg.vecdot(rows, rows).unsqueeze(0)
    rows = h.permute(1, 2, 0, 4, 3).reshape(n, s, k * o, t) @ inputs
    rows = rows.view(n, s, k, -1)
    return torch.linalg.vecdot(rows, rows).sum(1).T
