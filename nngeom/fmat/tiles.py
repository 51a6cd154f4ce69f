"""Kernels tile by tile: pairs of chunks of examples and outputs, each captured once a tile row, the symmetric half once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nngeom.core import memory
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.generator.sweep import Chunk, Sweep, _bytes
from nngeom.generator.task import leading_size
from nngeom.pmat.recipe import join_rows

Key = tuple[int, int]  # (first example, first output) of a chunk
Pair = Callable[[LayerJacobian, LayerJacobian], Tensor]  # a contribution of one block to a tile


def key(chunk: Chunk) -> Key:
    """Where a chunk starts."""
    return chunk.start, chunk.outputs[0]


def size(chunk: Chunk) -> int:
    """Bytes that a chunk holds."""
    return sum(_bytes(j) for j in chunk.jacobians.values())


def span(chunk: Chunk) -> tuple[slice, slice]:
    """Its outputs and its examples, as slices of the whole kernel."""
    k = next(iter(chunk.jacobians.values())).shape[0]
    return slice(chunk.outputs[0], chunk.outputs[0] + k), slice(chunk.start, chunk.start + chunk.examples)


@dataclass
class Side:
    """The examples along one axis of a kernel. Batches are read once and kept, so that every visit sees the same."""

    sweep: Sweep
    held: list[Chunk] | None = None

    def __post_init__(self):
        self.sweep.loader = list(self.sweep.task.batches(self.sweep.loader))
        self.sizes = [self._count(batch) for batch in self.sweep.loader]

    def _count(self, batch: Any) -> int:
        n = leading_size(batch)
        if n is None:
            with torch.no_grad():
                n = self.sweep.task.run(batch).shape[0]
        return n

    @property
    def examples(self) -> int:
        """How many there are."""
        return sum(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the kernel."""
        return accumulation_dtype(self.sweep.task.dtype)

    @property
    def device(self) -> torch.device:
        """Where the kernel is."""
        return self.sweep.task.device

    def chunks(self, after: Key = (-1, -1)) -> Iterator[Chunk]:
        """The chunks behind ``after``, from memory where they are held, else captured anew."""
        if self.held is not None:
            yield from (c for c in self.held if key(c) > after)
            return
        first, start = 0, 0
        while first < len(self.sizes) and start + self.sizes[first] <= after[0]:
            start += self.sizes[first]
            first += 1
        sweep = replace(self.sweep, loader=self.sweep.loader[first:], progress=False)
        for chunk in sweep.chunks() if sweep.loader else ():
            chunk = replace(chunk, start=chunk.start + start)
            if key(chunk) > after:
                yield chunk

    def groups(self) -> Iterator[list[Chunk]]:
        """Runs of chunks that together take half the budget; all of them stay in memory where they are one run."""
        group: list[Chunk] = []
        room, runs = memory.budget() // 2, 0
        for chunk in self.chunks():
            if group and room < size(chunk) and not self.sweep.keep_graph:
                yield group
                group, room, runs = [], memory.budget() // 2, runs + 1
            group.append(chunk)
            room -= size(chunk)
        if runs == 0:
            self.held = group
        yield group


def pairs(rows: Side, columns: Side | None) -> Iterator[tuple[Chunk, Chunk]]:
    """All pairs of chunks; with ``columns=None`` those on and above the diagonal of a square kernel."""
    if columns is not None and columns.held is None:
        for _ in columns.groups():  # held from now on, if they fit
            if columns.held is None:
                break
    for group in rows.groups():
        if columns is None:
            for j, x in enumerate(group):
                yield from ((x, y) for y in group[j:])
        for y in columns.chunks() if columns is not None else rows.chunks(after=key(group[-1])):
            yield from ((x, y) for x in group)


def matched(x: Chunk, y: Chunk, layer_of: Callable[[str], str]) -> Iterator[tuple[str, LayerJacobian, LayerJacobian]]:
    """``(layer, J, J')`` for every block; parameters that the two chunks group differently are paired as explicit rows."""
    common = [layout for layout in x.jacobians if layout in y.jacobians]
    for layout in common:
        yield layer_of(layout.names[0]), x.jacobians[layout], y.jacobians[layout]
    left, right = ({lay: j for lay, j in c.jacobians.items() if lay not in common} for c in (x, y))
    both = {name for lay in left for name in lay.names} & {name for lay in right for name in lay.names}
    layers: dict[str, list] = {}
    for layout in left:
        for piece in layout.pieces:
            for name in piece.names:
                if name in both:
                    layers.setdefault(layer_of(name), []).append(name)
    for layer, names in layers.items():
        yield layer, *(_explicit(replace(c, jacobians=js), names) for c, js in ((x, left), (y, right)))


def _explicit(chunk: Chunk, names: list[str]) -> FullJacobian:
    table = {name: piece for lay in chunk.jacobians for piece in lay.pieces for name in piece.names}
    layout = Layout(tuple(table[name] for name in sorted(names, key=lambda n: table[n].offset)))
    return FullJacobian(torch.cat(list(join_rows(chunk, layout, tuple(names))), 1)[:, :, None, None])
