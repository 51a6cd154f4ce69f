"""Implicit second moments: products by tangents, the metric of the outputs, and a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nngeom.capture.network import Batch
from nngeom.core import memory
from nngeom.core.flat_products import add_transposed_
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.tangents import are_adjoint, at_once_or_not, each, tangents_or_rows, times_rows
from nngeom.pullback.captured_pass import Pass
from nngeom.pullback.linearization import Linearization
from nngeom.pullback.many_tangents import ManyTangents
from nngeom.ranks.totals import mean
from nngeom.sweep.agreement import first_look
from nngeom.sweep.columns import Columns
from nngeom.sweep.sweep import Chunk, Sweep

# Columns for every vector up to which products by rows are preferred to a graph of the backward pass. Dense nets with
# as many as vectors took 0.7 to 1.0 of the time, with a quarter 0.8 to 1.0. With positions a quarter took 0.1 to 0.6,
# half as many 0.5 to 0.9, as many 0.5 (of images) to 1.2 (a transformer). Nets of benchmarks/implicit.py and
# workloads.py, 4 to 32 vectors, one thread of a CPU, torch 2.13, November 2026.
ROWS_A_VECTOR = 1.5
Summed = tuple[Tensor, int]  # over the examples of this process, and how many these are


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitFisher(PMatImplicit):
    """``1/n sum_i J_i^T L_i J_i`` with the metric ``L_i`` of the outputs, by ``J v``, then ``L``, then ``J^T``.

    ``columns``: how many a root of the metric has, at most, counted twice where positions share parameters; ``None``
    where some use of a parameter is not known to be read by an adapter.
    """

    columns: int | None = None

    def _chunks(self) -> Iterator[Chunk]:
        """The rows, batch by batch."""
        return self.sweep.chunks()

    def products(self, x: Tensor) -> Summed:
        """All vectors at once through one graph a batch, or by rows where these are few; those of models that cannot be
        differentiated twice one by one, in forward mode, or by rows.
        """
        if len(x) == 1:
            return self._one_by_one(x)
        if self.columns is not None and self.columns < ROWS_A_VECTOR * len(x):
            return self._by_rows(x)
        return at_once_or_not(lambda: self._at_once(x), lambda: self._one_by_one(x))

    def _one_by_one(self, x: Tensor) -> Summed:
        return tangents_or_rows(lambda: self._each_by_tangents(x), lambda: self._by_rows(x))

    def _each_by_tangents(self, x: Tensor) -> Summed:
        found = [self._by_tangents(row) for row in x]
        return torch.stack([total for total, _ in found]), found[0][1]

    def _at_once(self, x: Tensor) -> Summed:
        total, count = None, 0
        for batch in self.run.batches():
            tangents = ManyTangents.of(self.network, batch)
            pieces = tangents.pieces(len(x))
            if total is None and len(pieces) == 1:
                total = self._sandwich(tangents, x, count)
            else:
                total = torch.zeros_like(x) if total is None else total
                for lo, hi in pieces:
                    total[lo:hi] += self._sandwich(tangents, x[lo:hi], count)
            count += tangents.outputs.shape[0]
        return torch.zeros_like(x) if total is None else total, count

    def _sandwich(self, tangents: ManyTangents, x: Tensor, start: int) -> Tensor:
        """``sum_i J_i^T L_i J_i x`` over the examples of a batch, ``[b, d] -> [b, d]``."""
        pushed = tangents.push(x)
        u = self._metric_times_many(tangents.outputs.detach(), pushed, tangents.batch, start)
        pulled = tangents.pull(u)
        tangents.require_adjoint(u, pushed, pulled, x)
        return pulled.to(x.dtype)

    def _by_rows(self, x: Tensor) -> Summed:
        """The product by explicit cotangents, as every stored representation has them."""
        total, count = torch.zeros_like(x), 0
        for chunk in self._chunks():
            inner = times_rows(chunk, x)
            for layout, j in chunk.jacobians.items():
                add_transposed_(total, layout, j, inner)
            count = chunk.start + chunk.examples
        return total, count

    def _by_tangents(self, x: Tensor) -> Summed:
        linear, v = Linearization(self.network), self.named(x)
        total, count = torch.zeros_like(x), 0
        for batch in self.run.batches():
            outputs, tangent = linear.jvp(batch, v, ask=False)
            u = self._metric_times(outputs.detach(), tangent, batch, count)
            pulled = linear.vjp(outputs, u)
            if not are_adjoint(u, tangent, pulled, x) or not bool(tangent.any()):  # else that is the proof
                outputs, tangent = linear.jvp(batch, v)
                u = self._metric_times(outputs.detach(), tangent, batch, count)
                pulled = linear.vjp(outputs, u)
                if not are_adjoint(u, tangent, pulled, x):
                    raise RuntimeError("forward and reverse mode disagree at these numbers")
            total += pulled
            count += outputs.shape[0]
        return total, count

    def _metric_times(self, outputs: Tensor, tangent: Tensor, batch: Batch, start: int) -> Tensor:
        return self._metric_times_many(outputs, tangent.unsqueeze(0), batch, start)[0]

    def _metric_times_many(self, outputs: Tensor, tangents: Tensor, batch: Batch, start: int) -> Tensor:
        """The metric of the outputs times ``tangents [b, *outputs.shape]``."""
        times = getattr(self.sweep.cotangents, "times", None)
        if times is not None:
            return each(lambda tangent: times(outputs, tangent, batch, start), tangents)
        columns: Columns = self.sweep.cotangents.columns(outputs, batch, start)
        rows = tangents.flatten(2).transpose(0, 1)  # [n b o]
        total = torch.zeros_like(rows)
        for lo, hi in memory.pieces(columns.count, outputs.numel() * outputs.element_size()):
            v = columns.make(lo, hi).to(rows.dtype).flatten(2).transpose(0, 1)  # [n k o]
            total += rows @ v.mT @ v
        return total.transpose(0, 1).reshape(tangents.shape)

    def _exact_trace(self) -> Tensor:
        return self.scale * mean(self.run.team, "trace", self._trace)

    def _trace(self) -> Summed:
        total, count = torch.zeros((), dtype=self.dtype, device=self.device), 0
        with self.run.within():
            for chunk in self._chunks():
                total += sum(j.squared_norms().sum() for j in chunk.jacobians.values())
                count = chunk.start + chunk.examples
        return total, count

    def _exact_diagonal(self) -> Tensor:
        return self.scale * mean(self.run.team, "diagonal", self._diagonal)

    def _diagonal(self) -> Summed:
        out, count = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device), 0
        with self.run.within():
            for chunk in self._chunks():
                part = torch.zeros_like(out)
                for layout, j in chunk.jacobians.items():
                    layout.scatter_(part, j.square().to(out.dtype))
                out += part
                count = chunk.start + chunk.examples
        return out, count


def implicit(sweep: Sweep) -> ImplicitFisher:
    """The implicit matrix of a sweep, after a look at every batch, checked."""
    columns: list[int | None] = []

    def seen(run: Pass, found: Columns) -> None:
        columns.append(None if run.rest else found.count * (2 if run.has_positions else 1))

    looked = first_look(sweep.run, lambda: _looked(sweep, seen))
    known = [count for count in columns if count is not None]
    return ImplicitFisher(looked, columns=max(known) if known and len(known) == len(columns) else None)


def _looked(sweep: Sweep, seen: Callable[[Pass, Columns], None]) -> Sweep:
    held = replace(sweep, run=sweep.run.held().silent())
    held.look(seen)
    return held
