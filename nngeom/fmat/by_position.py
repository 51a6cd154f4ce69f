"""Kernels by positions of their columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from nngeom.core.errors import ArgumentError
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.positions import Positions
from nngeom.fmat.products import EVERYTHING, build
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
    """The kernel of ``rows`` and every position of the examples of ``columns``."""
    apart = replace(columns, apart=Positions(), sweep=columns.sweep.but(apart=True))
    kernel = build(FMatDense, rows, apart, EVERYTHING, metric=metric, progress=progress)[""]
    return PositionKernel(kernel.tensor.unflatten(-1, (columns.examples, -1)))


def require_alone(*others: object) -> None:
    """Raise :class:`ArgumentError` where other options are given that do not go with positions."""
    if any(other is not None and other is not False for other in others):
        raise ArgumentError(
            "by_position=True is of FMatDense, without centered=, differentiable=, estimator= and out=; leave one of "
            "them out"
        )
