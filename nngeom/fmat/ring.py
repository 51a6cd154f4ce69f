"""Kernels over several processes: each makes the rows of its own examples, while batches go round in a ring.

What travels is the visiting process's batches: inputs are small beside their rows, and no process holds all of them. Of
a square kernel every pair of processes computes its products once, and the mirror image is sent back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import SizeError
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.places import Places, nbytes
from nngeom.fmat.products import Grouping, Mean, products, squared_norms
from nngeom.fmat.side import Side
from nngeom.fmat.store import Store
from nngeom.fmat.visits import Piece, first_half, has_examples, on, parts, piece_of, shifted, visiting
from nngeom.pmat.metric import Metric

Tiles = dict[str, Tensor]


def gathered_kernels(
    kind: Any,
    rows: Side,
    columns: Side | None,
    grouping: Grouping,
    *,
    centered: bool = False,
    metric: Metric | None = None,
) -> dict[str, Any]:
    """``{group: kernel}`` of the examples of all processes, whole on each; as :func:`~nngeom.fmat.products.build`.

    Raises :class:`SizeError` where a kernel takes more than the smallest memory budget.
    """
    places = Places.of(rows)
    across = places if columns is None else Places.of(columns)
    require_room(kind, rows, columns, (places, across))
    tiles = strips(kind, rows, columns, grouping, (places, across), centered=centered, metric=metric)
    return {name: kind(places.whole(t)) for name, t in tiles.items()}


def strips(
    kind: Any,
    rows: Side,
    columns: Side | None,
    grouping: Grouping,
    places: tuple[Places, Places],
    *,
    centered: bool = False,
    metric: Metric | None = None,
) -> Tiles:
    """``{group: strip}``: the rows of this process's examples, ``places`` of the rows and of the columns."""
    kept, (own, across) = rows.kept, places
    if centered:
        rows, columns = rows.widened(), columns if columns is None else columns.widened()
    late = centered and columns is None and not kind.diagonal
    mean = mean_over(rows, own, metric) if centered and not late else None
    if kind.diagonal:
        with own.team.together("kernel"):
            found = _norms(rows, own, grouping, mean, metric)
        return {name: t.to(kept) for name, t in found.items()}
    explicit = not centered and metric is None
    rows = rows.for_tiles(explicit=explicit, on_disk=False)
    columns = columns if columns is None else columns.for_tiles(explicit=explicit, on_disk=False)

    def make(left: Side, right: Side | None) -> Tiles:
        return products(kind, left, right, grouping, Store(grouping.names), mean=mean, metric=metric)

    dtype = rows.dtype if mean is None else kept
    strip = Strip(kind, grouping.names, own, across, make, dtype=dtype, device=rows.device)
    found = strip.square(rows) if columns is None else strip.between(rows, columns)
    for t in found.values() if late else ():
        own.less_mean(t)
        t.sub_(t.mean(-1, keepdim=True))
    return {name: t.to(kept) for name, t in found.items()}


@dataclass(frozen=True)
class Strip:
    """The rows of one process in a kernel of a ``kind``, one a name, tile by tile by ``make``; ``own`` and ``across``:
    the examples of the rows and of the columns.
    """

    kind: Any
    names: Sequence[str]
    own: Places
    across: Places
    make: Callable[[Side, Side | None], Tiles]
    dtype: torch.dtype
    device: torch.device

    def square(self, rows: Side) -> Tiles:
        """With the same examples along both axes."""
        team, n = self.own.team, self.own.counts
        out = self._empty()
        with team.together("kernel") as note:
            note.mine = first_half(rows)
            if rows.examples:
                self._place(out, self.make(rows, None), (slice(0, n[team.rank]), self.own.mine))
        halves = note.all
        for step, batches in enumerate(visiting(team, rows, team.size // 2), 1):
            source, asked = (team.rank - step) % team.size, (team.rank + step) % team.size
            piece = piece_of(n, halves, team.rank, source)
            with team.together("kernel"):
                tiles = self._made(*parts(rows, batches, piece, n), piece)
                mirrored = [self.kind.mirror(tiles[name]).contiguous() for name in self.names]
                back = piece_of(n, halves, asked, team.rank)
                arrived = {name: self._room(back[1], back[0]) for name in self.names}
            team.pass_on(mirrored, list(arrived.values()), -step)
            self._place(out, tiles, (piece[0], shifted(piece[1], self.own.of_rank(source))))
            self._place(out, arrived, (back[1], shifted(back[0], self.own.of_rank(asked))))
        return out

    def between(self, rows: Side, columns: Side) -> Tiles:
        """With other examples along the columns."""
        team, out = self.own.team, self._empty()
        here = slice(0, self.own.counts[team.rank])
        with team.together("kernel"):
            if rows.examples and columns.examples:
                self._place(out, self.make(rows, columns), (here, self.across.mine))
        for step, batches in enumerate(visiting(team, columns, team.size - 1), 1):
            source = (team.rank - step) % team.size
            with team.together("kernel"):
                if rows.examples and self.across.counts[source]:
                    self._place(out, self.make(rows, on(columns, batches)), (here, self.across.of_rank(source)))
        return out

    def _made(self, left: Side, right: Side, piece: Piece) -> Tiles:
        if has_examples(left, right, piece):
            return self.make(left, right)
        return {name: self._room(*piece) for name in self.names}

    def _room(self, n: slice, m: slice) -> Tensor:
        sizes = self.kind.sizes(self.own.outputs, n.stop - n.start, m.stop - m.start)
        return torch.zeros(sizes, dtype=self.dtype, device=self.device)

    def _empty(self) -> Tiles:
        here, all_ = slice(0, self.own.counts[self.own.team.rank]), slice(0, self.across.total)
        return {name: self._room(here, all_) for name in self.names}

    def _place(self, out: Tiles, tiles: Tiles, place: tuple[slice, slice]) -> None:
        k = slice(0, self.own.outputs)
        for name, t in tiles.items():
            out[name][self.kind.place(k, place[0], k, place[1])] = t


def mean_over(side: Side, places: Places, metric: Metric | None) -> Mean:
    """The mean gradients over the examples of all processes."""
    with places.team.together("mean row"):
        count = side.examples
        d = side.run.network.collection.numel
        none = torch.zeros(places.outputs, d, dtype=side.dtype, device=side.device)
        total = Mean.over(side).flat * count if count else none
    places.team.sum_([total])
    flat = total / places.total
    return Mean(flat, flat if metric is None else metric.times(flat))


def _norms(rows: Side, places: Places, grouping: Grouping, mean: Mean | None, metric: Metric | None) -> Tiles:
    if rows.examples:
        return squared_norms(rows, grouping, mean, metric)
    none = torch.zeros(places.outputs, 0, dtype=rows.dtype, device=rows.device)
    return dict.fromkeys(grouping.names, none)


def require_room(kind: Any, rows: Side, columns: Side | None, places: tuple[Places, Places]) -> None:
    """Raise :class:`SizeError` where a whole kernel takes more than the smallest memory budget."""
    if kind.diagonal:
        return
    own, across = places
    shape = kind.sizes(own.outputs, own.total, across.total)
    size, budget = nbytes(shape, rows.kept), min(own.team.exchange("memory budget", rows.run.memory_budget))
    if size > budget:
        plain = (columns is None or columns.apart is None) and not rows.sweep.policy.keep_graph
        parts = "sharded=True, which keeps each process's rows, or " if plain and kind is FMatDense else ""
        raise SizeError(
            f"the kernel {shape} takes {size} bytes on every process and memory_budget is {budget}; pass {parts}"
            f"memory_budget={size} to have it whole"
        )
