"""The queries of influence: what is differentiated of them, and their gradients times the matrix, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from nngeom.capture.network import targets
from nngeom.core.errors import OutputError
from nngeom.core.factored import FactoredJacobian
from nngeom.core.jacobian import FullJacobian, LayerJacobian, tensors
from nngeom.core.layout import Layout
from nngeom.core.weighted import pieces
from nngeom.cotangents.per_example import CallableLoss
from nngeom.fmat.side import Side
from nngeom.pmat.metric import ByBlock, Metric
from nngeom.sweep.columns import Columns
from nngeom.sweep.sweep import Chunk


@dataclass(frozen=True)
class QueryFunction:
    """The gradients of a function ``(outputs, targets) -> (n,)``; targets are ``None`` where batches have none."""

    function: Callable[[Tensor, Any], Tensor]

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """One cotangent: the gradient in the outputs."""
        g = CallableLoss(self._checked).gradient(outputs, targets(batch))
        return Columns(1, lambda lo, hi: g.unsqueeze(0))

    def _checked(self, outputs: Tensor, y: Any) -> Tensor:
        value = self.function(outputs, y)
        if not isinstance(value, Tensor) or value.shape != outputs.shape[:1] or not value.requires_grad:
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            given += ", detached from the outputs" if isinstance(value, Tensor) and not value.requires_grad else ""
            raise OutputError(
                f"query_function returned {given}; expected one number a query, ({outputs.shape[0]},), computed from "
                "the outputs"
            )
        return value


class Queries(Protocol):
    """Some queries, their gradients times the matrix."""

    @property
    def place(self) -> slice:
        """Which queries."""

    @property
    def examples(self) -> int:
        """How many."""

    def pairs(
        self, theirs: ByBlock, rights: dict[Layout, LayerJacobian]
    ) -> Iterator[tuple[Layout, LayerJacobian, LayerJacobian]]:
        """``(layout, left, right)`` whose products sum to the scores of a chunk of training examples, given as its
        rows by block and the right halves of those.
        """


@dataclass
class Part:
    """Some queries: their rows by block of the matrix, and the left halves of the products with others."""

    chunk: Chunk
    metric: Metric
    rows: ByBlock
    lefts: dict[Layout, LayerJacobian] = field(default_factory=dict)
    wholes: dict[int, LayerJacobian] = field(default_factory=dict)

    @staticmethod
    def of(chunk: Chunk, metric: Metric) -> Part:
        """Of a chunk of queries: explicit halves but where factored ones are smaller."""
        part = Part(chunk, metric, metric.by_block(chunk.jacobians))
        for b, rows in part.rows.items():
            if metric.meet(rows, rows):
                part.lefts |= {layout: formed(metric.left(layout, x)) for layout, x in rows.items()}
            else:
                part.whole(b)
        return part

    @property
    def place(self) -> slice:
        """Which queries."""
        return slice(self.chunk.start, self.chunk.start + self.chunk.examples)

    @property
    def examples(self) -> int:
        """How many."""
        return self.chunk.examples

    def whole(self, b: int) -> LayerJacobian:
        """The left half over all parameters of block ``b``."""
        if b not in self.wholes:
            self.wholes[b] = formed(self.metric.whole_left(b, self.rows[b]))
        return self.wholes[b]

    def pairs(
        self, theirs: ByBlock, rights: dict[Layout, LayerJacobian]
    ) -> Iterator[tuple[Layout, LayerJacobian, LayerJacobian]]:
        """As :meth:`Queries.pairs`, in the structure that both sides have."""
        for b in self.rows.keys() & theirs.keys():
            if self.metric.meet(self.rows[b], theirs[b]):
                common = [layout for layout in self.rows[b] if layout in theirs[b]]
                yield from ((layout, self.lefts[layout], rights[layout]) for layout in common)
            else:
                for layout, j in theirs[b].items():
                    yield layout, self.whole(b), self.metric.whole_right(b, {layout: j})


def formed(x: LayerJacobian) -> LayerJacobian:
    """The same rows, explicit unless they are factored and take less memory so."""
    k, n, s, o, i = x.shape
    if isinstance(x, FullJacobian):
        return x
    if isinstance(x, FactoredJacobian) and sum(t.numel() for t in tensors(x)) < k * n * s * o * i:
        return x
    out = torch.empty(k, n, s, o, i, dtype=x.dtype, device=x.device)
    for lo, hi in pieces(x):
        out[:, lo:hi] = x.examples(lo, hi).matrix()
    return FullJacobian(out)


def loads(side: Side, metric: Metric, most: int) -> Iterator[list[Part]]:
    """The parts of all queries, as many together as have room in half the budget if explicit, of at most ``most``
    bytes.
    """
    room = max(1, most // (metric.collection.numel * metric.dtype.itemsize))
    load: list[Part] = []
    left = room
    for group in side.groups():
        for chunk in group.chunks:
            at = 0
            while at < chunk.examples:
                count = min(left, chunk.examples - at)
                load.append(Part.of(cut(chunk, at, at + count), metric))
                at, left = at + count, left - count
                if not left:
                    yield load
                    load, left = [], room
    if load:
        yield load


def cut(chunk: Chunk, lo: int, hi: int) -> Chunk:
    """The examples ``lo`` to ``hi`` of a chunk."""
    jacobians = {layout: j.examples(lo, hi) for layout, j in chunk.jacobians.items()}
    return replace(chunk, jacobians=jacobians, examples=hi - lo, start=chunk.start + lo)
