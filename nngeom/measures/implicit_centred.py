"""Implicit second moments of rows less their mean: the mean is taken from inner products, before any square."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from nngeom.capture.network import Batch
from nngeom.core import memory
from nngeom.measures.mean_row import MeanRow, mean_row
from nngeom.pmat.implicit_fisher import ImplicitFisher
from nngeom.pullback.linearization import Linearization
from nngeom.pullback.many_tangents import ManyTangents
from nngeom.sweep.agreement import agree, first_look
from nngeom.sweep.columns import Columns, Cotangents
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Chunk, Policy, Sweep


def implicit_centred(run: Run, cotangents: Cotangents, label: str) -> ImplicitCentred:
    """The second moment of the rows of ``cotangents`` less their means, after two sweeps over the batches of a ``run``,
    the mean first; ``label``: of the progress bar.
    """
    with run.within():
        sweep = Sweep(run, cotangents, Policy("mean row", reread=False)).held()
        agree(run, label, representation=None, metric=cotangents)
        mean = mean_row(sweep)
        sweep = sweep.but(label=label, reread=True)
        quiet = first_look(run, lambda: replace(sweep, run=sweep.run.held().silent()))
        return ImplicitCentred(quiet, mean=mean)


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitCentred(ImplicitFisher):
    """``1/n sum_ik (r_ik - m_k) <r_ik - m_k, x>`` of the rows ``r`` of cotangents ``k``, whose mean is ``m_k``, by a
    forward-mode and a backward pass.
    """

    mean: MeanRow = field(kw_only=True)

    def _chunks(self) -> Iterator[Chunk]:
        return map(self.mean.taken_from, self.sweep.chunks())

    def of_parameters(self, names: tuple[str, ...]) -> ImplicitCentred:
        part = cast(ImplicitCentred, super().of_parameters(names))
        with part.run.within():
            return replace(part, mean=mean_row(part.sweep))

    def _sandwich(self, tangents: ManyTangents, x: Tensor, start: int) -> Tensor:
        tangents.require_right()
        weighted, means = self._weighted(tangents.outputs, tangents.push(x), tangents.batch, x, start)
        return tangents.pull(weighted).to(x.dtype) - means

    def _by_tangents(self, x: Tensor) -> tuple[Tensor, int]:
        linear, v = Linearization(self.network), self.named(x)
        total, count = torch.zeros_like(x), 0
        for batch in self.run.batches():
            outputs, tangent = linear.jvp(batch, v)
            weighted, means = self._weighted(outputs, tangent.unsqueeze(0), batch, x.unsqueeze(0), count)
            total += linear.vjp(outputs, weighted[0]) - means[0]
            count += outputs.shape[0]
        return total, count

    def _weighted(
        self, outputs: Tensor, tangents: Tensor, batch: Batch, x: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """For every ``x [b, d]``: the cotangents times ``<r_ik - m_k, x>``, summed over ``k``, ``[b, *outputs.shape]``,
        and the means times these, ``[b, d]``.
        """
        columns: Columns = self.sweep.cotangents.columns(outputs.detach(), batch, start)
        rows = tangents.flatten(2).to(x.dtype)  # [b n o]
        weighted, means = torch.zeros_like(rows), torch.zeros_like(x)
        for lo, hi in memory.pieces(columns.count, outputs.numel() * outputs.element_size()):
            made, mean = columns.make(lo, hi).flatten(2).to(x.dtype), self.mean.flat[lo:hi].to(x.dtype)  # [k n o]
            inner = torch.einsum("kno,bno->bkn", made, rows) - (x @ mean.T).unsqueeze(2)
            weighted += torch.einsum("bkn,kno->bno", inner, made)
            means += inner.sum(2) @ mean
        return weighted.to(outputs.dtype).view(len(x), *outputs.shape), means
