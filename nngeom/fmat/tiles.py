"""Kernels tile by tile: pairs of chunks of examples and outputs, each captured once a tile row, the symmetric half
once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from nngeom.capture.recorder import record
from nngeom.core import memory
from nngeom.core.errors import NonFiniteError
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.core.parts import join, joins
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import START, Chunk, Cotangents, Policy, Sweep

Key = tuple[int, int]  # (first example, first output) of a chunk: the order in which chunks are captured
SHARES = 4  # of the budget: one for a chunk of columns, two for rows, one for what is made of them


def key(chunk: Chunk) -> Key:
    """Where a chunk starts."""
    return chunk.start, chunk.cotangents[0]


def span(chunk: Chunk) -> tuple[slice, slice]:
    """Its outputs and its examples, as slices of the whole kernel."""
    width = next((j.shape[0] for j in chunk.jacobians.values()), chunk.cotangents[1])
    return slice(chunk.cotangents[0], chunk.cotangents[0] + width), slice(chunk.start, chunk.start + chunk.examples)


@dataclass
class Group:
    """Chunks held in memory together; neighbours of the same structure are joined."""

    chunks: list[Chunk]
    last: Key


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
    on_disk: bool = False  # the kernel is: no tile of it may take more than its share of the budget

    @staticmethod
    def of(run: Run, cotangents: Cotangents, policy: Policy = Policy()) -> Side:
        """The rows of a run for the cotangents of a metric."""
        return Side(Sweep(run.held(), cotangents, policy))

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
        return sum(self.sizes)

    @functools.cached_property
    def outputs(self) -> int:
        """``c``: how many rows an example has, outputs or one of a loss; raises what a first look raises."""
        with torch.no_grad(), self.within():
            return self._rows(self.run.network.run(self.run.loader[0]))

    def first_outputs(self) -> torch.Tensor:
        """The outputs ``(n, ...)`` of the first batch, without graph; raises what a first look at the data raises."""
        outputs = record(self.run.network, self.run.loader[0]).outputs.detach()
        self.outputs = self._rows(outputs)
        return outputs

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
        return replace(self, sweep=self.sweep.but(explicit=explicit), on_disk=on_disk)

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

    def chunks(self, after: Key = START, reuse: bool = False) -> Iterator[Chunk]:
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
            yield chunk

    def one_batch(self) -> OneBatch | None:
        """The rows of the only batch; ``None`` where there are several batches, or no room for one at once."""
        if self.wide or self.watch or len(self.sizes) != 1:
            return None
        found = self.sweep.but(most_examples=self.most_examples).one_batch()
        if found is None:
            return None
        run, v = found
        return OneBatch(run.by_layers(v), len(v), run.has_positions)

    def groups(self, after: Key = START) -> Iterator[Group]:
        """Runs of chunks that together take half the budget; where one run holds all, it stays in memory."""
        if self.group is not None:
            if self.group.last > after:
                yield self.group
            return
        chunks: list[Chunk] = []
        most = memory.budget() * (2 if after == START else 1) // SHARES
        room, held, runs = most, set[int](), 0
        for chunk in self.chunks(after):
            size = chunk.nbytes(held)
            if chunks and room < size and not self.sweep.policy.keep_graph:
                yield Group(joined(chunks, self.most_examples), key(chunks[-1]))
                chunks, room, held, runs = [], most, set[int](), runs + 1
                size = chunk.nbytes(held)
            chunks.append(chunk)
            room -= size
        if chunks:
            group = Group(joined(chunks, self.most_examples), key(chunks[-1]))
            if runs == 0 and after == START:
                self.group = group
            yield group


def require_finite(results: Iterable[torch.Tensor], *sides: Side | None) -> None:
    """Where rows were not searched: raise :class:`NonFiniteError` if results of them are not finite, naming batch and
    examples.
    """
    if all(side is None or side.watch for side in sides) or bool(
        torch.isfinite(torch.stack([t.detach().sum() for t in results])).all()
    ):
        return
    for side in sides:
        if side is not None:
            side.sweep.raise_where_not_finite()
    raise NonFiniteError(
        "products of gradients overflowed to NaN or infinity; scale the outputs, or use a wider dtype, model.double()"
    )


def joined(chunks: list[Chunk], most: int | None) -> list[Chunk]:
    """Chunks of neighbouring examples, with the same outputs and structure, as one of at most ``most`` examples: small
    batches cost nothing extra.
    """
    by_outputs: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in chunks:
        k, _ = span(chunk)
        by_outputs.setdefault((k.start, k.stop), []).append(chunk)
    out = []
    for same in by_outputs.values():
        run = [same[0]]
        for chunk in same[1:]:
            fits = most is None or chunk.start + chunk.examples - run[0].start <= most
            if fits and chunk.start == run[-1].start + run[-1].examples and _fits(run[-1], chunk):
                run.append(chunk)
            else:
                out.append(_join(run))
                run = [chunk]
        out.append(_join(run))
    return out


def _fits(x: Chunk, y: Chunk) -> bool:
    return x.jacobians.keys() == y.jacobians.keys() and all(
        joins(j, y.jacobians[lay]) for lay, j in x.jacobians.items()
    )


def _join(run: list[Chunk]) -> Chunk:
    if len(run) == 1:
        return run[0]
    jacobians = {lay: join(j, [c.jacobians[lay] for c in run[1:]]) for lay, j in run[0].jacobians.items()}
    return replace(run[0], jacobians=jacobians, examples=sum(c.examples for c in run))


def pairs(rows: Side, columns: Side | None) -> Iterator[tuple[Chunk, Chunk]]:
    """All pairs of chunks; with ``columns=None`` those on and above the diagonal of a square kernel."""
    for group in rows.groups():
        if columns is None:
            for j, x in enumerate(group.chunks):
                yield from ((x, y) for y in group.chunks[j:])
        for right in columns.groups() if columns is not None else rows.groups(after=group.last):
            yield from ((x, y) for x in group.chunks for y in right.chunks)


def matched(x: Chunk, y: Chunk, layer_of: Callable[[str], str]) -> Iterator[tuple[str, LayerJacobian, LayerJacobian]]:
    """``(layer, J, J')`` for every block; parameters that the two chunks group differently are paired as explicit
    rows.
    """
    common = [layout for layout in x.jacobians if layout in y.jacobians]
    for layout in common:
        yield layer_of(layout.names[0]), x.jacobians[layout], y.jacobians[layout]
    left, right = ({lay: j for lay, j in c.jacobians.items() if lay not in common} for c in (x, y))
    both = {name for lay in left for name in lay.names} & {name for lay in right for name in lay.names}
    for name in sorted(both):
        yield layer_of(name), _explicit(left, name), _explicit(right, name)


def _explicit(jacobians: Mapping[Layout, LayerJacobian], name: str) -> FullJacobian:
    """The rows of one parameter, in its own order."""
    layout = next(lay for lay in jacobians if name in lay.names)
    column = 0
    for piece in layout.pieces:
        i = piece.arrangement.sizes[2]
        if name in piece.names:
            break
        column += i
    rows = piece.arrangement.write(jacobians[layout].matrix()[..., column : column + i])
    return FullJacobian(rows[:, :, None, None])
