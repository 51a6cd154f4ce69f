"""Matrices whose blocks do not fit a process together, in one sweep: what each process sees of a layer goes to the
process that keeps its block, while the sweep goes on.

Sums of another's layers are kept here as long as a share of the memory budget has room for them, and sent at the end.
Of the layers beyond that every chunk is sent: its sums, or its rows where these are fewer numbers, or where the
statistic needs what only the owner has, the means of a sweep before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nngeom.core.jacobian import tensors as tensors_of
from nngeom.core.linalg import accumulation_dtype
from nngeom.core.statistic import Sums
from nngeom.measures.in_parts import of_parts, owners_of, sizes_of
from nngeom.pmat.drive import Repeated, not_finite, one_dtype, overflowed
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Means, Selection, Statistic
from nngeom.pmat.representation import Representation
from nngeom.pmat.selected import moved
from nngeom.pmat.sharded import PMatSharded
from nngeom.ranks.messages import put_together, taken_apart
from nngeom.ranks.parcels import Parcels
from nngeom.space.collection import LayerCollection
from nngeom.sweep.chunk import Chunk
from nngeom.sweep.sweep import Sweep, require_examples

SHARE = 4  # sums of other processes' layers are kept within such a part of the memory budget


def streamed(sweep: Sweep, whole: Representation[PMat]) -> PMatSharded:
    """The matrix of a sweep, of which each process keeps the blocks of its own layers.

    Raises :class:`StructureError` where a block reaches over several layers, :class:`LoaderError` without examples,
    :class:`NonFiniteError` where a mean is not finite.
    """
    sweep = sweep.held()
    run, collection = sweep.run, sweep.run.network.collection
    sizes = sizes_of(sweep, whole)
    owners, chosen = owners_of(sizes, run.team.size), whole.within(collection)
    room = run.memory_budget // (SHARE * accumulation_dtype(run.network.dtype).itemsize)
    layers = Layers(collection, owners, sizes, room)
    sweep = sweep.but(part_of=chosen.division, any_columns=False)  # rows that can be sent
    part, count = own_part(chosen, layers, Repeated(sweep, chosen.passes))
    dtypes = run.team.exchange("dtypes", None if part is None else part.dtype)
    parts = () if part is None else (part,)
    return of_parts(run, owners, parts, count, next(filter(None, dtypes)))


@dataclass(frozen=True)
class Layers:
    """Of a ``collection``: the rank that keeps each, how many numbers that takes, and ``room`` for others'."""

    collection: LayerCollection
    owners: dict[str, int]
    sizes: dict[str, int]
    room: int

    def names(self, rank: int) -> Iterator[str]:
        """The parameters of a rank."""
        named = zip(self.collection.names, self.collection.layers)
        return (name for name, layer in named if self.owners[layer] == rank)

    def parts(self, chunk: Chunk, collections: Sequence[LayerCollection]) -> Iterator[tuple[str, Chunk]]:
        """The layers of a chunk, each as a chunk of the collection of its owner."""
        layer_of = dict(zip(self.collection.names, self.collection.layers))
        found: dict[str, dict[Any, Any]] = {}
        for layout, j in chunk.jacobians.items():
            layer = layer_of[layout.names[0]]
            found.setdefault(layer, {})[moved(layout, collections[self.owners[layer]])] = j
        for layer, jacobians in found.items():
            yield layer, replace(chunk, jacobians=jacobians)

    def stay(self, rank: int) -> set[str]:
        """Layers of others whose sums a process keeps until the end of the sweep."""
        left, found = self.room, set[str]()
        for layer, size in self.sizes.items():
            if self.owners[layer] != rank and size <= left:
                left -= size
                found.add(layer)
        return found


def own_part(chosen: Representation[PMat], layers: Layers, source: Repeated) -> tuple[PMat | None, int]:
    """The part of this process, if it keeps a layer, and the number of examples."""
    team = source.run.team
    collections = [layers.collection.only(layers.names(rank)) for rank in range(team.size)]
    each = [chosen.among(c) for c in collections]
    recipes = [r.recipe(Selection.of(c)) if len(c) else None for r, c in zip(each, collections)]
    statistics: list[Statistic | None] = [None if recipe is None else next(recipe) for recipe in recipes]
    going, mine, blocks = [recipe is not None for recipe in recipes], recipes[team.rank], None
    while True:
        sums, count = _agreed(Stream(layers, collections, statistics, going), source)
        means = _means(sums, source, count)
        following: Statistic | None = None
        with team.together("blocks") as note:
            if mine is not None and going[team.rank]:
                try:
                    following = mine.send(means)
                except StopIteration as end:
                    blocks = end.value
            note.mine = following is not None
        going = note.all
        if not any(going):
            break
        statistics = [following if rank == team.rank else None for rank in range(team.size)]
    if blocks is None:
        return None, count
    return each[team.rank].kind.of_blocks(collections[team.rank], blocks, count), count


def _agreed(stream: Stream, source: Repeated) -> tuple[Sums, int]:
    """The sums of this process's layers over all examples; gone over once more where processes found a layer used in
    unlike ways, which the fallback takes then.
    """
    run = source.run
    team, left = run.team, run.left_to_fallback
    while True:
        sweep = replace(stream, own=Sums(), others={}, error=None)
        count = sweep.go(source)
        both = set[str]().union(*team.exchange("structure", left))
        if not any(team.exchange("structure", both != left)):
            break
        left |= both
        source.restart()
    with team.together("what processes sent each other"):
        if sweep.error is not None:
            raise sweep.error
    return sweep.own, require_examples(count)


def _means(sums: Sums, source: Repeated, count: int) -> Means:
    sums.count = count
    means = one_dtype(sums.mean(used_up=True))
    odd = next(filter(None, source.run.team.exchange("finite", not_finite(means))), None)
    if odd is not None:
        with source.run.team.together("sweep"):
            source.raise_where_not_finite()
        raise overflowed(odd, count)
    return means


@dataclass
class Stream:
    """One sweep: ``statistics`` of the layers of each rank where this process knows them, of those that are ``going``
    on.
    """

    layers: Layers
    collections: Sequence[LayerCollection]
    statistics: Sequence[Statistic | None]
    going: Sequence[bool]
    own: Sums = field(default_factory=Sums)
    others: dict[str, Sums] = field(default_factory=dict)  # of layers that stay until the end
    error: Exception | None = None  # of what arrived

    def go(self, source: Repeated) -> int:
        """Once over the data; the number of all examples."""
        team, device, count = source.run.team, source.run.network.device, 0
        mine: Any = self.statistics[team.rank]
        parcels = Parcels(team, device, lambda told, tensors: self._receive(mine, told, tensors, device))
        with parcels.carried(), team.together("sweep") as note:
            stay = self.layers.stay(team.rank)
            for chunk in source.chunks():
                count += chunk.examples if chunk.first else 0
                with torch.no_grad():
                    for layer, part in self.layers.parts(chunk, self.collections):
                        if self.going[self.layers.owners[layer]]:
                            self._put(layer, part, parcels, stays=layer in stay)
            for layer in list(self.others):
                self._send(self.layers.owners[layer], self.others.pop(layer), parcels)
            note.mine = count
        self.error = parcels.error
        return sum(note.all)

    def _put(self, layer: str, part: Chunk, parcels: Parcels, *, stays: bool) -> None:
        """Where a layer of a chunk goes."""
        rank = self.layers.owners[layer]
        statistic, tensors = self.statistics[rank], [t for j in part.jacobians.values() for t in tensors_of(j)]
        if rank == parcels.team.rank and statistic is not None:
            self.own.add(statistic, part)
        elif statistic is not None and stays:
            self.others.setdefault(layer, Sums()).add(statistic, part)
        elif statistic is None or sum(t.numel() for t in tensors) < self.layers.sizes[layer]:
            rest, tensors = taken_apart(part)
            parcels.send(rank, rest, tensors)
        else:
            sums = Sums()
            sums.add(statistic, part)
            self._send(rank, sums, parcels)

    def _send(self, rank: int, sums: Sums, parcels: Parcels) -> None:
        parcels.send(rank, sums.kept(), sums.addends())

    def _receive(self, statistic: Statistic, told: Any, tensors: list[Tensor], device: torch.device) -> None:
        """What another process saw of a layer of this one."""
        if isinstance(told, bytes):
            self.own.add(statistic, put_together(told, tensors))
            return
        sums = Sums()
        sums.adopt(told, device)
        for place, t in zip(sums.addends(), tensors):
            place.copy_(t)
        self.own.merge([sums])
