"""Contractions over positions, and the counts of operations that choose between them.

Wherever positions ``t`` share parameters, the same number can be reached by forming the rows ``[o, i]`` first or by
contracting pairs of positions first. Costs are multiply-adds for one example; the rules are written here, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nngeom.core import memory

if TYPE_CHECKING:
    from nngeom.core.jacobian import FactoredJacobian


def sum_positions(g: Tensor, a: Tensor) -> Tensor:
    """``[k n t s o], [n t s i] -> [k n s o i]``: rows, by one product an example (and group)."""
    k, n, t, s, o = g.shape
    left = g.permute(1, 3, 0, 4, 2).reshape(n * s, k * o, t)
    right = a.permute(0, 2, 1, 3).reshape(n * s, t, -1)
    return torch.bmm(left, right).reshape(n, s, k, o, -1).permute(2, 0, 1, 3, 4)


def pairs_are_cheaper(g_shape: torch.Size, i: int) -> bool:
    """Whether summing outputs before the weight-shaped product (pairs of positions) beats forming the rows."""
    k, _, t, s, o = g_shape
    return s == 1 and t + 1 < 1.5 * k


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


def positions_are_cheaper(g_shape: torch.Size, i: int) -> bool:
    """Whether ``|J|**2`` is cheaper by inner products of positions than by rows."""
    k, _, t, _, o = g_shape
    return t * (k * o + i) < k * o * i


def gram_positions_are_cheaper(g: torch.Size, h: torch.Size, i: int) -> bool:
    """Whether a Gram block is cheaper by inner products of positions than by rows, for one pair of rows."""
    (k, n, t, _, o), (l, m, u, _, _) = g, h
    rows = o * i + o * i * (t / (l * m) + u / (k * n))
    factored = t * u * i / (k * l) + t * u * o / k + t * o
    return factored < rows if t * u > 1 else True


def gram_by_positions(x: FactoredJacobian, y: FactoredJacobian) -> Tensor:
    """``[k n l m]``: ``sum_s (a a'^T) * (g g'^T)``, positions contracted first."""
    (k, n, t, groups, o), (l, m, u, _, _) = x.g.shape, y.g.shape
    out = x.g.new_zeros(k, n, l, m)
    for s in range(groups):
        inner = x.input_gram(y, s)  # [n t m u]
        if t == u == 1:
            g, h = x.g[:, :, 0, s].reshape(k * n, o), y.g[:, :, 0, s].reshape(l * m, o)
            out += (g @ h.T).view(k, n, l, m) * inner.reshape(n, 1, m)
            continue
        g = x.g[:, :, :, s].permute(1, 0, 2, 3).reshape(n, k, t * o)
        h = y.g[:, :, :, s].permute(1, 2, 0, 3).reshape(m, u, l * o)
        for lo, hi in memory.pieces(m, n * t * l * o * g.element_size(), most=4 * memory.CACHE_BYTES):
            mixed = inner[:, :, lo:hi].permute(2, 0, 1, 3).reshape(hi - lo, n * t, u) @ h[lo:hi]  # [m, n t, l o]
            mixed = mixed.view(hi - lo, n, t, l, o).permute(1, 2, 4, 3, 0).reshape(n, t * o, l * (hi - lo))
            out[..., lo:hi] += (g @ mixed).view(n, k, l, hi - lo).transpose(0, 1)
    return out
