"""The rows of a linear map that makes the outputs themselves, under a metric of them that is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nngeom.core import contract, linalg
from nngeom.core.completed import CompletedBasis
from nngeom.core.factored import FactoredJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.linalg import Basis
from nngeom.core.output_metric import OutputMetric


@dataclass(frozen=True, eq=False)
class HeadJacobian(LayerJacobian):
    """``J[k, n] = sum_t v[k, n, t] (x) a[n, t]`` with the columns ``v`` of the root of a metric, each of one position.

    Sums over all ``k`` need no root: ``sum_k v v^T`` is the metric. Others form the columns.
    """

    a: Tensor  # [n t 1 i]
    metric: OutputMetric  # of rows (n t)
    make: Callable[[], Tensor]  # the columns, [k, n, ..., c]
    count: int  # k
    ug: Basis | None = None  # [1 c o], a basis that the outputs were turned to

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        n, _, s, i = self.a.shape
        return self.count, n, s, self.metric.diagonal().shape[1] if self.ug is None else self.ug.shape[-1], i

    @property
    def positions(self) -> int:
        """Number of positions ``t`` that share the parameters."""
        return self.a.shape[1]

    @property
    def share(self) -> float:
        """Of a position in an example."""
        return 1 / max(1, self.positions)

    def explicit(self) -> FactoredJacobian:
        """The same with its columns formed."""
        n, t = self.a.shape[:2]
        v = self.make()
        g = v.reshape(self.count, n, t, 1, v.shape[-1]).to(self.dtype)
        return FactoredJacobian(self.a, g if self.ug is None else contract.times(g, self.ug))

    def matrix(self) -> Tensor:
        return self.explicit().matrix()

    def examples(self, lo: int, hi: int) -> LayerJacobian:
        return self.explicit().examples(lo, hi)

    def cotangents(self, lo: int, hi: int) -> LayerJacobian:
        return self.explicit().cotangents(lo, hi)

    def square(self) -> Tensor:
        total = self._squares().to(self.dtype).T @ self.a.square().flatten(0, 2)
        return total.unsqueeze(0)

    def _squares(self) -> Tensor:
        """``[(n t), o]``: the sums of the squared columns, a row of the metric each."""
        if self.ug is None:
            return self.metric.diagonal()
        if isinstance(self.ug, CompletedBasis):
            return torch.cat([self.metric.along(q[0]) for _, q in self.ug.pieces()], -1)
        return self.metric.along(self.ug[0])

    def rotate(self, ua: Basis | None, ug: Basis | None) -> LayerJacobian:
        if self.ug is not None and ug is not None:
            return self.explicit().rotate(ua, ug)
        a = self.a if ua is None else contract.times(self.a, ua)
        return replace(self, a=a, ug=self.ug if ug is None else ug)

    def second_moment(self) -> Tensor:
        """``[1, o, o]``: ``sum_knt v v^T``."""
        total = self.metric.total().to(self.dtype).unsqueeze(0)
        return total if self.ug is None else linalg.right(linalg.left(self.ug, total, transpose=True), self.ug)

    def squared_columns(self) -> Tensor:
        """``[1, o]``: the diagonal of :meth:`second_moment`."""
        return self._squares().to(self.dtype).sum(0, keepdim=True)


def zero_gradient(shape: torch.Size, like: Tensor) -> Tensor:
    """One gradient of zeros, ``[1, *shape]``, that takes no memory."""
    return like.new_zeros(1).expand(1, *shape)
