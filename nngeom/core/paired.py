"""Products of each row with the one of the same example and cotangent in another set of rows, ``<x[k, n], y[k, n]>``.

A function that dispatches on the type of the left rows; what is registered forms none where that is cheaper.
"""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
from torch import Tensor

from nngeom.core import costs, memory
from nngeom.core.factored import FactoredJacobian, LookupJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.weighted import WeightedJacobian


@functools.singledispatch
def paired(x: LayerJacobian, y: LayerJacobian) -> Tensor:
    """``[k, n]``: ``<x[k, n], y[k, n]>``."""
    return by_rows(x, y)


@paired.register
def _(x: WeightedJacobian, y: LayerJacobian) -> Tensor:
    if _is_factored(x.j) and _is_factored(y) and x.j.positions == y.positions == 1:
        g, a = (x.j.g * y.g)[:, :, 0], (x.j.a * y.a)[:, 0]  # [k n s o], [n s i]
        return (g * torch.einsum("nsi,soi->nso", a, x.w)).sum((2, 3))
    return by_rows(x, y)


@paired.register
def _(x: FactoredJacobian, y: LayerJacobian) -> Tensor:
    if not (_is_factored(x) and _is_factored(y)):
        return by_rows(x, y)
    if x.positions == y.positions == 1:
        return ((x.g * y.g).sum(-1) * (x.a * y.a).sum(-1)).sum((2, 3))
    if costs.norms_by_positions(x.g.shape, x.shape[-1]):
        return by_positions(x, y)
    return by_rows(x, y)


def by_rows(x: LayerJacobian, y: LayerJacobian) -> Tensor:
    """Explicit rows of both, a few examples at a time."""
    k, n, s, o, i = x.shape
    cuts = memory.pieces(n, 2 * k * s * o * i * x.dtype.itemsize, most=memory.CACHE_BYTES)
    rows = ((x.examples(lo, hi).matrix(), y.examples(lo, hi).matrix()) for lo, hi in cuts)
    return torch.cat([(left * right).sum((2, 3, 4)) for left, right in rows], 1)


def by_positions(x: FactoredJacobian, y: FactoredJacobian) -> Tensor:
    """``sum_s,t,u (a_t . a'_u) (g_t . g'_u)``, a few examples at a time."""
    k, n, t, s, _ = x.g.shape
    out = []
    for lo, hi in memory.pieces(n, 2 * k * s * t * y.positions * x.dtype.itemsize, most=memory.CACHE_BYTES):
        inputs = torch.einsum("ntsi,nusi->nstu", x.a[lo:hi], y.a[lo:hi])
        out.append(torch.einsum("kntso,nstu,knuso->kn", x.g[:, lo:hi], inputs, y.g[:, lo:hi]))
    return torch.cat(out, 1)


def _is_factored(j: LayerJacobian) -> TypeGuard[FactoredJacobian]:
    return isinstance(j, FactoredJacobian) and not isinstance(j, LookupJacobian)
