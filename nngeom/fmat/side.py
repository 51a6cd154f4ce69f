"""The examples along one axis of a kernel, and their rows as often as they are asked for."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from nngeom.capture.recorder import record
from nngeom.capture.remedies import gradients
from nngeom.core import memory
from nngeom.core.draws import factors, outer
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.fmat.chunks import Group, Key, joined, key
from nngeom.fmat.places import Places
from nngeom.fmat.positions import Positions
from nngeom.pullback.backward import dense
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import START, Chunk, Policy, Sweep

SHARES = 4  # of the budget: one for a chunk of columns, two for rows, one for what is made of them


@dataclass(frozen=True)
class OneBatch:
    """All rows of one batch, some layers at a time: who holds none when it asks for the next has memory for one part
    only.
    """

    parts: Iterator[dict[Layout, LayerJacobian]]
    outputs: int  # c
    positions: bool  # whether a block may have several


@dataclass
class Side:
    """The examples along one axis of a kernel. Batches are read once and kept, so that every visit sees the same."""

    sweep: Sweep  # of a run that is held
    group: Group | None = None  # all rows, where they are held in memory
    wide: bool = False  # rows in float64, whatever the model's dtype
    apart: Positions | None = None  # positions are examples
    on_disk: bool = False  # the kernel is: no tile of it may take more than its share of the budget
    places: Places | None = None  # where the axis goes over the examples of several processes

    @staticmethod
    def of(run: Run, cotangents: Cotangents, policy: Policy = Policy()) -> Side:
        """The rows of a run for the cotangents of a metric."""
        return Side(Sweep(run.held(), cotangents, policy))

    def placed(self) -> Side:
        """The same as an axis over the examples of all processes, of which each visits its own."""
        return self if self.run.team.size == 1 else replace(self, places=Places.of(self))

    @property
    def run(self) -> Run:
        """The model on these examples."""
        return self.sweep.run

    @property
    def watch(self) -> bool:
        """Whether rows are searched for NaN and infinity; else who uses them searches the result."""
        return self.sweep.policy.watch

    @property
    def sizes(self) -> list[int]:
        """Examples in every batch."""
        return self.run.sizes

    @property
    def examples(self) -> int:
        """How many there are."""
        if self.apart is None:
            return sum(self.sizes)
        if self.apart.count is None:
            next(self.chunks(), None)
        return sum(self.sizes) * (self.apart.count or 1)

    @property
    def everywhere(self) -> int:
        """How many examples the axis has, those of other processes included."""
        return self.examples if self.places is None else self.places.total

    def whole(self, rows: torch.Tensor) -> torch.Tensor:
        """``[c, everywhere, ...]`` of the ``rows [c, examples, ...]`` of this process."""
        return rows if self.places is None else self.places.whole(rows)

    @functools.cached_property
    def outputs(self) -> int:
        """``c``: how many rows an example has, outputs or one of a loss; raises what a first look raises."""
        if self.places is not None:
            return self.places.outputs
        with torch.no_grad(), self.within():
            return self._rows(self.run.network.run(self.run.loader[0]))

    def first_outputs(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The outputs ``(n, ...)`` of the first batch, without graph, and for a random cotangent of them the gradients
        of all parameters that they reach; raises what a first look at the data raises.
        """
        capture = record(self.run.network, self.run.loader[0], exchange=True)
        outputs = capture.outputs.detach()
        self.outputs = self._rows(outputs)
        if not capture.outputs.requires_grad:
            return outputs, []
        v = outer(factors(outputs.shape, torch.Generator().manual_seed(11), outputs))
        pulled = map(dense, gradients(capture.outputs, list(capture.leaves.tensors.values()), v))
        return outputs, [outputs.new_zeros(0) if g is None else g for g in pulled]

    def _rows(self, outputs: torch.Tensor) -> int:
        return self.sweep.cotangents.columns(outputs, self.run.loader[0], 0).count

    @property
    def most_examples(self) -> int | None:
        """Examples along one side of a tile; ``None``: any number, the kernel is in memory anyway."""
        return (
            max(1, math.isqrt(memory.budget() // SHARES // self.dtype.itemsize) // self.outputs)
            if self.on_disk
            else None
        )

    @property
    def kept(self) -> torch.dtype:
        """dtype of the finished kernel."""
        return accumulation_dtype(self.run.network.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """dtype in which it is computed."""
        return torch.float64 if self.wide else self.kept

    def widened(self) -> Side:
        """The same examples with rows in float64: subtracting a large mean must not leave rounding errors."""
        return replace(self, wide=True, group=None)

    def for_tiles(self, *, explicit: bool, on_disk: bool) -> Side:
        """The same examples for the products of a kernel, see :class:`Policy` and ``on_disk``."""
        return replace(self, sweep=self.sweep.but(explicit=explicit and self.apart is None), on_disk=on_disk)

    @property
    def device(self) -> torch.device:
        """Where the kernel is."""
        return self.run.network.device

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """What products with the Jacobian depend on: the parameters."""
        return tuple(self.run.network.parameters.values())

    def within(self) -> AbstractContextManager[int]:
        """Work under the memory budget that the object was built with, which outlives that call."""
        return self.run.within()

    def chunks(self, after: Key = START, *, reuse: bool = False) -> Iterator[Chunk]:
        """The chunks behind ``after``, captured anew; with ``reuse`` each may overwrite the one before."""
        first, start = 0, 0
        while first < len(self.sizes) and start + self.sizes[first] <= after[0]:
            start += self.sizes[first]
            first += 1
        if first == len(self.sizes):
            return
        alive = self.sweep.policy.keep_graph
        sweep = replace(self.sweep, run=self.run.on(self.run.loader[first:])).but(
            shares=SHARES, divide=not alive, reuse=reuse and not alive, most_examples=self.most_examples
        )
        for chunk in sweep.chunks(after=(after[0] - start, after[1])):
            chunk = replace(chunk, start=chunk.start + start)
            if self.wide:
                chunk = replace(chunk, jacobians={lay: j.to(torch.float64) for lay, j in chunk.jacobians.items()})
            yield chunk if self.apart is None else self.apart.taken_apart(chunk)

    def one_batch(self) -> OneBatch | None:
        """The rows of the only batch; ``None`` where there are several batches, or no room for one at once."""
        if self.wide or self.watch or len(self.sizes) != 1:
            return None
        begun = self.sweep.but(most_examples=self.most_examples).one_batch()
        if begun is None:
            return None
        run, v = begun
        return OneBatch(run.by_layers(v), len(v), run.has_positions)

    def groups(self, after: Key = START) -> Iterator[Group]:
        """Runs of chunks that together take half the budget; where one run holds all, it stays in memory."""
        if self.group is not None:
            if self.group.last > after:
                yield self.group
            return
        chunks: list[Chunk] = []
        most = memory.budget() * (2 if after == START else 1) // SHARES
        room, storages, groups = most, set[int](), 0
        for chunk in self.chunks(after):
            size = chunk.nbytes(storages)
            if chunks and room < size and not self.sweep.policy.keep_graph:
                yield Group(joined(chunks, self.most_examples), key(chunks[-1]))
                chunks, room, storages, groups = [], most, set[int](), groups + 1
                size = chunk.nbytes(storages)
            chunks.append(chunk)
            room -= size
        if chunks:
            group = Group(joined(chunks, self.most_examples), key(chunks[-1]))
            if groups == 0 and after == START:
                self.group = group
            yield group
