"""Kernels by positions of their columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from nngeom.core.errors import ArgumentError, OutputError
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.kernels import kernels
from nngeom.fmat.positions import Positions
from nngeom.fmat.products import EVERYTHING
from nngeom.fmat.side import Side
from nngeom.pmat.metric import Metric


@dataclass(frozen=True, eq=False)
class PositionKernel:
    """A kernel by positions of its columns, ``tensor[k, n, l, m, t]``: what position ``t`` of the column example ``m``
    adds to ``K[k, n, l, m]``, ``(c, n, c, m, t)``.
    """

    tensor: Tensor

    def total(self) -> FMatDense:
        """The kernel: the sum over positions."""
        return FMatDense(self.tensor.sum(-1))

    def __repr__(self) -> str:
        return f"PositionKernel(tensor={tuple(self.tensor.shape)}, dtype={self.tensor.dtype})"


def positioned(rows: Side, columns: Side, metric: Metric | None, *, progress: bool = False) -> PositionKernel:
    """The kernel of ``rows`` and every position of the examples of ``columns``, of those of all processes."""
    apart = replace(columns, apart=Positions(), sweep=columns.sweep.but(apart=True))
    count = _agreed(apart)
    kernel = kernels(FMatDense, rows, apart, EVERYTHING, metric=metric, progress=progress)[""]
    return PositionKernel(kernel.tensor.unflatten(-1, (-1, count)))


def _agreed(columns: Side) -> int:
    """How many positions the examples of all processes have; raises :class:`OutputError` where these differ."""
    with columns.run.team.together("positions") as note:
        note.mine = columns.apart.count if columns.apart and columns.examples else None
    known = sorted({count for count in note.all if count is not None})
    if len(known) > 1:
        raise OutputError(
            f"examples have {known[0]} and {known[1]} positions on different processes; expected as many in all: pad "
            "them to one length"
        )
    return known[0] if known else 1


def require_alone(*others: object) -> None:
    """Raise :class:`ArgumentError` where other options are given that do not go with positions."""
    if any(other is not None and other is not False for other in others):
        raise ArgumentError(
            "by_position=True is of FMatDense, without centered=, differentiable=, estimator= and out=; leave one of "
            "them out"
        )
