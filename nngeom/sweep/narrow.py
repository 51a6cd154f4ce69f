"""Second moments from the narrow side of the outputs: a linear map that makes more outputs than it has inputs.

All rows of the layers behind such a head are ``J[k] = (W^T v_k)^T dh/dw`` for its inputs ``h`` and the columns
``v_k`` of a root of the metric ``H``. Their second moments depend on ``sum_k W^T v_k v_k^T W = W^T H W`` alone, a
matrix as wide as ``h``, of whose own root there are as many columns as ``h`` is wide, where ``H`` has as many as there
are outputs. The head itself needs no column at all where ``H`` is known in closed form. This holds for statistics that
are sums over cotangents within a block, and where nothing but the head lies between ``h`` and the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core import memory
from nngeom.core.factored import FactoredJacobian
from nngeom.core.head import HeadJacobian, zero_gradient
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.output_metric import OutputMetric
from nngeom.pullback.captured_pass import Pass
from nngeom.pullback.head import Head, head_of
from nngeom.sweep.chunk import Chunk
from nngeom.sweep.columns import Columns, Cotangents

GAIN = 1.25  # how many times fewer columns there must be
PIECE_BYTES = 2**25  # of gradients that are pulled back at once: more is slower, being fresh memory


def narrowed(run: Pass, cotangents: Cotangents, columns: Columns) -> Narrow | None:
    """The rows of the head, and the columns to be pulled back from its inputs; ``None`` where there is no head that is
    proved, it is not narrow, or the metric is not known without its root.
    """
    known = getattr(cotangents, "metric", None)
    head = None if known is None or run.keep_graph else head_of(run, lambda inputs: GAIN * inputs <= columns.count)
    if known is None or head is None:
        return None
    metric = known(run.capture.values, run.capture.batch)
    if metric is None or not head.is_proved(run):
        return None
    return Narrow(head, metric, columns)


@dataclass(frozen=True)
class Narrow:
    """The block of the head under the columns of the outputs, all others under those of its inputs."""

    head: Head
    metric: OutputMetric
    columns: Columns  # of the outputs

    def chunks(self, run: Pass, start: int) -> Iterator[Chunk]:
        """The rows of the head with the first of all others; ``start``: the running index of the first example."""
        columns, descent = behind(self.head, self.metric), run.descent.behind(self.head.entry, self.head.index)
        rows, total = self.rows(run), max(1, columns.count)
        for lo, hi in memory.pieces(columns.count, self._bytes_each(run), most=PIECE_BYTES):
            pulled = descent.pull(columns.make(lo, hi), retain=hi < columns.count, empty=run.empty) | rows
            rows = {}
            in_order = {group.layout: pulled[group.layout] for group in run.groups if group.layout in pulled}
            yield Chunk(in_order, run.n, start, (lo, total))
        if rows:
            yield Chunk(rows, run.n, start, (0, total))

    def _bytes_each(self, run: Pass) -> int:
        """Gradients of one column at all uses but the head."""
        uses = [recorded for j, recorded in enumerate(run.capture.uses) if j != self.head.index]
        numbers = sum(recorded.shape.numel() for recorded in uses) + torch.Size(self.head.shape).numel()
        return 2 * numbers * self.head.weight.element_size()

    def rows(self, run: Pass) -> dict[Layout, LayerJacobian]:
        """The rows of the head, for all columns."""
        group, recorded = self.head.group, self.head.recorded
        gradient = zero_gradient(recorded.shape, run.capture.values)
        rows: Any = group.jacobian({self.head.index: gradient}, run.n, run.empty)
        if not isinstance(rows, FactoredJacobian):
            raise RuntimeError(f"the rows of a head are {type(rows).__name__}")
        make = lambda: self.columns.make(0, self.columns.count)
        return {group.layout: HeadJacobian(rows.a, self.metric, make, self.columns.count)}


def behind(head: Head, metric: OutputMetric) -> Columns:
    """The columns of ``W^T H W`` at every position that counts, ``v [k, n, *positions, w]``."""
    w, t = head.width, head.positions
    counted = [0] if t == 1 else metric.diagonal().any(1).view(-1, t).any(0).nonzero().flatten().tolist()
    n = head.shape[0]
    kept: dict[int, Tensor] = {}

    def root(position: int) -> Tensor:
        if position not in kept:
            kept.clear()
            kept[position] = metric.behind(head.weight, range(position, n * t, t))
        return kept[position]

    def make(lo: int, hi: int) -> Tensor:
        v = head.weight.new_zeros(hi - lo, n, t, w)
        for j in range(lo // w, (hi - 1) // w + 1):
            first, last = max(lo, j * w), min(hi, (j + 1) * w)
            v[first - lo : last - lo, :, counted[j]] = root(counted[j])[..., first - j * w : last - j * w].movedim(
                -1, 0
            )
        return v.view(hi - lo, *head.shape)

    return Columns(w * len(counted), make)
