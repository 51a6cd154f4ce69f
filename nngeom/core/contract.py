"""Contractions over positions: the rows of a few examples at a time, or pairs of positions.

:mod:`nngeom.core.costs` says which is the cheaper. Steps are in the memory order that the data has, and small enough to
stay in a processor cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nngeom.core import costs, memory
from nngeom.core.completed import CompletedBasis
from nngeom.core.statistic import Moment


def sum_positions(g: Tensor, a: Tensor) -> Tensor:
    """``[k n t s o], [n t s i] -> [k n s o i]``: rows, by one product an example (and group)."""
    k, n, t, s, o = g.shape
    left = g.permute(1, 3, 0, 4, 2).reshape(n * s, k * o, t)
    right = a.permute(0, 2, 1, 3).reshape(n * s, t, a.shape[-1])
    return torch.bmm(left, right).reshape(n, s, k, o, a.shape[-1]).permute(2, 0, 1, 3, 4)


def scaled_sums(g: Tensor, a: Tensor, *, ones: bool) -> Tensor:
    """``[k n t s], [n t s 1] -> [k n s 1]``: ``sum_t g a``, and with ``ones`` beside it ``sum_t g``, ``[k n s 2]``."""
    a = a.squeeze(-1)
    if g.shape[2] == 1:
        sums = [(g * a)[:, :, 0]] + [g[:, :, 0]] * ones
    elif g.requires_grad or a.requires_grad:
        sums = [(g * a).sum(2)] + [g.sum(2)] * ones
    else:  # one cotangent at a time, multiplied where it lies in the cache
        working = torch.empty_like(a)
        sums = [torch.stack([torch.mul(h, a, out=working).sum(1) for h in g])] + [g.sum(2)] * ones
    return torch.stack(sums, -1)


def square_by_rows(g: Tensor, a: Tensor) -> Tensor:
    """``sum_kn (sum_t g a)**2`` as ``[s, o, i]``: rows of a few examples at a time, squared where they lie in the
    cache.
    """
    k, n, t, s, o = g.shape
    i = a.shape[-1]
    total = g.new_zeros(s, o, i)
    if o >= costs.WIDE:  # products of one cotangent are large enough
        for lo, hi in memory.pieces(n, s * o * i * g.element_size(), most=memory.CACHE_BYTES // 2):
            right = a[lo:hi].permute(2, 0, 1, 3)  # [s n t i]
            for row in g[:, lo:hi]:
                rows = torch.matmul(row.permute(2, 0, 3, 1), right)  # [s n o i]
                total = total + _squared(rows).sum(1)
        return total
    for lo, hi in memory.pieces(n, k * s * o * i * g.element_size(), most=memory.CACHE_BYTES // 2):
        left = g[:, lo:hi].permute(3, 1, 0, 4, 2).reshape(s, hi - lo, k * o, t)
        rows = torch.matmul(left, a[lo:hi].permute(2, 0, 1, 3))  # [s n (k o) i]
        total = total + _squared(rows).view(s, -1, o * i).sum(1).view(s, o, i)
    return total


def _squared(x: Tensor) -> Tensor:
    return x.square() if x.requires_grad else x.square_()


def summed_squares(g: Tensor) -> Tensor:
    """``sum_k g[k]**2``, without the squares of all in between."""
    if g.requires_grad or not len(g):
        return g.square().sum(0)
    total = g[0].square()
    for h in g[1:]:
        total.addcmul_(h, h)
    return total


def squared_lengths(x: Tensor) -> Tensor:
    """``sum_i x[..., i]**2``, without the squares in between: fresh memory costs more than they do. Differentiable any
    number of times.
    """
    result: Tensor = _SquaredLengths.apply(x)  # type: ignore[no-untyped-call]
    return result


class _SquaredLengths(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        result: Tensor = torch.linalg.vector_norm(x, dim=-1).square()
        return result

    @staticmethod
    def backward(ctx: Any, s: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = (2 * s).unsqueeze(-1) * x
        return result


def weighted_sum(u: Tensor, g: Tensor) -> Tensor:
    """``sum_k u[k, n] g[k, n]`` for ``u [*b, k, n]``, ``g [k, n, t, s, o]``: ``[*b, n, t, s, o]``."""
    if u.ndim > 2 or g.requires_grad or u.requires_grad:
        return torch.einsum("kntso,...kn->...ntso", g, u)
    total = g[0] * u[0, :, None, None, None]
    for row, weight in zip(g[1:], u[1:]):
        total.addcmul_(row, weight[:, None, None, None])
    return total


def weight_gradient(w: Tensor, a: Tensor) -> Tensor:
    """``[n, t, s, o], [n, t, s, i] -> [s, o, i]``."""
    if w.shape[2] > 1:
        return torch.einsum("ntso,ntsi->soi", w, a)
    rows = w.movedim(-1, 0).reshape(w.shape[-1], -1) if w.stride(-1) != 1 else w.reshape(-1, w.shape[-1]).T
    columns = a.movedim(-1, 0).reshape(a.shape[-1], -1).T if a.stride(-1) != 1 else a.reshape(-1, a.shape[-1])
    return (rows @ columns).unsqueeze(0)


def second_moment(x: Tensor, scale: float = 1.0) -> Tensor | Moment:
    """``[*lead, s, p] -> [s, p, p]``: scaled sums of outer products, in the memory order that the data has."""
    s, p = x.shape[-2:]
    if s == 1 and x.stride(-1) == 1:
        return Moment(x.reshape(-1, p), (1,), scale)
    rows = x.movedim((-2, -1), (0, 1)).reshape(s, p, -1)  # [s p r], without a copy of any order where r is contiguous
    return Moment(rows[0].T, (1,), scale) if s == 1 else scale * (rows @ rows.mT)


def times(x: Tensor, u: Tensor | CompletedBasis) -> Tensor:
    """``[*lead, s, p], [s, p, q] -> [*lead, s, q]``."""
    lead, (s, p) = x.shape[:-2], x.shape[-2:]
    if isinstance(u, CompletedBasis):
        return u.coordinates_of(x.movedim(-2, 0).reshape(s, -1, p)).view(s, *lead, p).movedim(0, -2)
    if s > 1:
        return torch.einsum("...sp,spq->...sq", x, u)
    if x.stride(-1) == 1:
        return (x.reshape(-1, p) @ u[0]).view(*lead, 1, u.shape[-1])
    across = x.movedim(-1, 0)
    if across.is_contiguous():
        return (u[0].T @ across.reshape(p, -1)).view(-1, *lead, 1).movedim(0, -1)
    if lead[-1] < costs.WIDE:
        return (x.reshape(-1, p) @ u[0]).view(*lead, 1, u.shape[-1])
    y = x[..., 0, :].mT.reshape(-1, p, lead[-1])  # positions innermost, as convolutions have them
    return torch.bmm(u[0].T.expand(len(y), -1, -1), y).view(*lead[:-1], -1, lead[-1]).mT.unsqueeze(-2)


def square_by_pairs(g: Tensor, a: Tensor) -> Tensor:
    """``sum_kn (sum_t g a)**2`` as ``[1, o, i]``: ``sum_{t,u} (sum_k g_t g_u)^T (a_t a_u)``, outputs summed first."""
    k, n, t, _, o = g.shape
    i = a.shape[-1]
    first, second = torch.triu_indices(t, t, device=g.device)
    weight = torch.where(first == second, 1.0, 2.0).to(g)
    total = g.new_zeros(o, i)
    for lo, hi in memory.pieces(n, len(first) * (o + i) * g.element_size(), most=2 * memory.CACHE_BYTES):
        x, y = a[lo:hi, :, 0], g[:, lo:hi, :, 0]
        inputs = x[:, first] * x[:, second]
        gradients = y[0][:, first] * y[0][:, second]
        for j in range(1, k):
            gradients.addcmul_(y[j][:, first], y[j][:, second])
        gradients *= weight[:, None]
        total.addmm_(gradients.reshape(-1, o).T, inputs.reshape(-1, i))
    return total.unsqueeze(0)


def products(g: Tensor, inner: Tensor, h: Tensor, empty: Callable[..., Tensor] | None = None) -> Tensor:
    """``sum_tu inner[m, u, n, t] <g[n, k, t], h[m, l, u]>`` as ``[n, k, m, l]``: output gradients ``g [n, k, t, o]``
    against ``h [m, (l o), u]`` under inner products of inputs ``inner [m, u, n, t]``.

    ``empty(*sizes)``: memory for what lies between when ``g`` is of one example, of which nothing is copied.
    """
    (n, k, t, o), (m, u, _, _) = g.shape, inner.shape
    if not t * u:
        return g.new_zeros(n, k, m, h.shape[1] // o)
    if n == 1:
        mixed = torch.bmm(h, inner[:, :, 0], out=empty(m, h.shape[1], t) if empty else None)  # [m (l o) t]
        return (g[0].mT.reshape(k, o * t) @ mixed.view(-1, o * t).T).view(1, k, m, -1)
    mixed = torch.bmm(inner.reshape(m, u, n * t).mT, h.mT).view(m, n, t, -1, o)
    mixed = mixed.permute(1, 0, 3, 2, 4).reshape(n, -1, t * o)  # outputs innermost: runs long enough to copy well
    return (g.reshape(n, k, t * o) @ mixed.mT).view(n, k, m, -1)


def squared_norms(g: Tensor, a: Tensor, *, by_pairs: bool) -> Tensor:
    """``sum_s |sum_t g_t (x) a_t|**2`` as ``[k, n]``: by pairs of positions ``sum_tu (a_t . a_u) (g_t . g_u)``, or by
    rows.
    """
    k, n, t, s, o = g.shape
    i = a.shape[-1]
    if g.requires_grad or a.requires_grad:  # with a graph, every slice costs a gradient of the whole
        return _pieces_of_norms(g, a, by_pairs=by_pairs)
    together = k if o < costs.LOOPED else 1
    each = together * s * (t * t if by_pairs else o * i) * g.element_size()
    parts = [
        _pieces_of_norms(g[:, lo:hi], a[lo:hi], together, by_pairs=by_pairs)
        for lo, hi in memory.pieces(n, each, most=memory.CACHE_BYTES // 2)
    ]
    return torch.cat(parts, 1)


def _pieces_of_norms(g: Tensor, a: Tensor, together: int | None = None, *, by_pairs: bool) -> Tensor:
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
        one: Tensor = torch.linalg.vecdot(rows, rows).unsqueeze(0)
        return one
    rows = h.permute(0, 2, 1, 4, 3).reshape(n, s, k * o, t) @ inputs
    rows = rows.view(n, s, k, -1)
    result: Tensor = torch.linalg.vecdot(rows, rows).sum(1).T
    return result
