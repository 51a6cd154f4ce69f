"""Rows taken apart into those of their positions: of every example as many, which sum to the rows.

Functions that dispatch on the type of rows; rows that are no sums over positions have none.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from torch import Tensor

from nngeom.core.factored import FactoredJacobian, LookupJacobian
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.tied import TiedJacobian


@dataclass(frozen=True, eq=False)
class PositionedJacobian(LayerJacobian):
    """Rows that are sums over positions, each kept: of norms, scales and shifts, whose rows are as small as what they
    are made of.
    """

    m: Tensor  # [k n t s o i]

    def matrix(self) -> Tensor:
        return self.m.sum(2)

    def examples(self, lo: int, hi: int) -> PositionedJacobian:
        return PositionedJacobian(self.m[:, lo:hi])

    def cotangents(self, lo: int, hi: int) -> PositionedJacobian:
        return PositionedJacobian(self.m[lo:hi])


@functools.singledispatch
def positions(j: LayerJacobian) -> int | None:
    """How many positions rows are sums over; ``None`` where they are kept as sums."""
    return None


@positions.register
def _(j: FactoredJacobian) -> int | None:
    return j.positions


@positions.register
def _(j: PositionedJacobian) -> int | None:
    return j.m.shape[2]


@positions.register
def _(j: TiedJacobian) -> int | None:
    counts = {term.positions for _, term in j.terms}
    return counts.pop() if len(counts) == 1 else None


@functools.singledispatch
def at_positions(j: LayerJacobian) -> LayerJacobian:
    """The rows of every position of every example, ``[k, (n t), s, o, i]``, of rows that have :func:`positions`."""
    raise TypeError(f"{type(j).__name__} rows are kept as sums over positions")


@at_positions.register
def _(j: FactoredJacobian) -> LayerJacobian:
    return FactoredJacobian(j.a.flatten(0, 1).unsqueeze(1), _apart(j.g))


@at_positions.register
def _(j: PositionedJacobian) -> LayerJacobian:
    return FullJacobian(j.m.flatten(1, 2))


@at_positions.register
def _(j: LookupJacobian) -> LayerJacobian:
    return replace(j, a=j.a.reshape(-1, 1), g=_apart(j.g))


@at_positions.register
def _(j: TiedJacobian) -> LayerJacobian:
    return TiedJacobian(tuple((turned, at_positions(term)) for turned, term in j.terms))  # type: ignore[misc]


def _apart(g: Tensor) -> Tensor:
    """``[k n t s o] -> [k (n t) 1 s o]``."""
    return g.flatten(1, 2).unsqueeze(2)
