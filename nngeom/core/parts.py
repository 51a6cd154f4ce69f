"""Rows of part of a block's parameters, rows written where they belong, and the rows of several batches as one.

Functions that dispatch on the type of rows: all work with any rows but :func:`join`, which :func:`joins` answers for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nngeom.core.errors import UnsupportedError
from nngeom.core.factored import FactoredJacobian, LookupJacobian
from nngeom.core.jacobian import FullJacobian, LayerJacobian


@functools.singledispatch
def has_positions(j: LayerJacobian) -> bool:
    """Whether rows are sums over several positions."""
    return False


@has_positions.register
def _(j: FactoredJacobian) -> bool:
    return j.positions > 1


@functools.singledispatch
def features(j: LayerJacobian, lo: int, hi: int) -> LayerJacobian:
    """The part of the block in groups ``lo .. hi - 1``, or for one group in rows ``lo .. hi - 1`` of ``o``."""
    m = j.matrix()
    return FullJacobian(m[:, :, lo:hi] if m.shape[2] > 1 else m[:, :, :, lo:hi])


@features.register
def _(j: FactoredJacobian, lo: int, hi: int) -> LayerJacobian:
    if j.g.shape[3] > 1:
        each = j.each[lo:hi] if isinstance(j.each, Tensor) else j.each
        return replace(j, a=j.a[:, :, lo:hi], g=j.g[:, :, :, lo:hi], each=each)
    return replace(j, g=j.g[..., lo:hi])


@functools.singledispatch
def cuts_inputs(j: LayerJacobian) -> bool:
    """Whether :func:`inputs` costs no more than its part of the rows."""
    return False


@cuts_inputs.register
def _(j: FactoredJacobian) -> bool:
    return True


@cuts_inputs.register
def _(j: LookupJacobian) -> bool:
    return False


@functools.singledispatch
def inputs(j: LayerJacobian, lo: int, hi: int) -> LayerJacobian:
    """The part of the block in columns ``lo .. hi - 1`` of ``i``."""
    return FullJacobian(j.matrix()[..., lo:hi])


@inputs.register
def _(j: FactoredJacobian, lo: int, hi: int) -> LayerJacobian:
    return replace(j, a=j.a[..., lo:hi])


@inputs.register
def _(j: LookupJacobian, lo: int, hi: int) -> LayerJacobian:
    return FullJacobian(j.matrix()[..., lo:hi])


@functools.singledispatch
def writes_columns(j: LayerJacobian) -> bool:
    """Whether :func:`write_columns` writes in place, without the rows in between."""
    return False


@writes_columns.register
def _(j: FactoredJacobian) -> bool:
    t, s = j.g.shape[2:4]
    return (s == 1 or t == 1) and j.a.is_floating_point() and not (j.g.requires_grad or j.a.requires_grad)


@functools.singledispatch
def write_columns(j: LayerJacobian, out: Tensor, lo: int, hi: int) -> None:
    """Write the input columns ``lo .. hi - 1`` of the rows into ``out [k, n, s, o, hi - lo]``."""
    out.copy_(j.matrix()[..., lo:hi])


@write_columns.register
def _(j: FactoredJacobian, out: Tensor, lo: int, hi: int) -> None:
    if j.g.shape[2] == 1:
        torch.mul(j.g[:, :, 0].unsqueeze(-1), j.a[:, 0, :, lo:hi].unsqueeze(-2), out=out)
        return
    for g, rows in zip(j.g, out):
        torch.bmm(g[:, :, 0].mT, j.a[:, :, 0, lo:hi], out=rows[:, 0])


@functools.singledispatch
def joins(x: LayerJacobian, y: LayerJacobian) -> bool:
    """Whether the examples of ``y`` can follow those of ``x`` in one Jacobian."""
    return False


@joins.register
def _(x: FullJacobian, y: LayerJacobian) -> bool:
    return type(y) is FullJacobian


@joins.register
def _(x: FactoredJacobian, y: LayerJacobian) -> bool:
    return type(y) is type(x) and x.a.shape[1:] == y.a.shape[1:]


@functools.singledispatch
def join(x: LayerJacobian, others: Sequence[LayerJacobian]) -> LayerJacobian:
    """The examples of ``x`` followed by those of ``others``, all of which it :func:`joins`; always a copy."""
    raise UnsupportedError(f"{type(x).__name__} keeps batches apart")


@join.register
def _(x: FullJacobian, others: Sequence[FullJacobian]) -> LayerJacobian:
    return FullJacobian(torch.cat([x.m, *(j.m for j in others)], 1))


@join.register
def _(x: FactoredJacobian, others: Sequence[FactoredJacobian]) -> LayerJacobian:
    a, g = torch.cat([x.a, *(j.a for j in others)]), torch.cat([x.g, *(j.g for j in others)], 1)
    return replace(x, a=a, g=g)
