"""Rows between two factors, and rows times a number, in the structure that they have.

Functions that dispatch on the type of rows: all work with any rows, what is registered keeps them factored.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from torch import Tensor

from nngeom.core import contract, linalg
from nngeom.core.factored import FactoredJacobian, LookupJacobian
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.tied import SumJacobian, TiedJacobian


@functools.singledispatch
def sandwiched(j: LayerJacobian, a: Tensor, g: Tensor) -> LayerJacobian:
    """Rows ``g J a``, for symmetric factors ``a`` over inputs and ``g`` over outputs, each dense or its diagonal."""
    return FullJacobian(linalg.right(linalg.left(g, j.matrix()), a))


@sandwiched.register
def _(j: FactoredJacobian, a: Tensor, g: Tensor) -> LayerJacobian:
    return FactoredJacobian(_times(j.a, a), _times(j.g, g))


@sandwiched.register
def _(j: LookupJacobian, a: Tensor, g: Tensor) -> LayerJacobian:
    gradients = _times(j.g, g)
    if linalg.is_diagonal(a):
        return replace(j, g=gradients * a[0][j.a][:, :, None, None])
    return FactoredJacobian(a[0][j.a].unsqueeze(2), gradients)


@sandwiched.register
def _(j: TiedJacobian, a: Tensor, g: Tensor) -> LayerJacobian:
    terms = tuple((t, sandwiched(x, g, a) if t else sandwiched(x, a, g)) for t, x in j.terms)
    return TiedJacobian(terms)  # type: ignore[arg-type]


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """``[*lead, s, p]`` times a factor of every group."""
    return x * factor if linalg.is_diagonal(factor) else contract.times(x, factor)


@functools.singledispatch
def scaled(j: LayerJacobian, c: Tensor) -> LayerJacobian:
    """Rows times one number."""
    return FullJacobian(c * j.matrix())


scaled.register(FactoredJacobian, lambda j, c: replace(j, g=c * j.g))
scaled.register(TiedJacobian, lambda j, c: replace(j, terms=tuple((t, scaled(x, c)) for t, x in j.terms)))
scaled.register(SumJacobian, lambda j, c: SumJacobian(tuple((place, scaled(x, c)) for place, x in j.terms)))
