"""Which representation keeps the curvature of which parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nngeom.core.errors import ArgumentError
from nngeom.optim.curvature import Curvature, keeper
from nngeom.optim.manner import Manner
from nngeom.optim.schedule import Schedule
from nngeom.pmat.recipe import Selection
from nngeom.pmat.representation import Representation
from nngeom.space.collection import LayerCollection
from nngeom.sweep.observe import Observer
from nngeom.sweep.sweep import Chunk

REST = -2  # the part of parameters that the chosen representation cannot hold


class Partition:
    """The parts of the parameters, made when their structure is first seen."""

    def __init__(
        self,
        collection: LayerCollection,
        representation: Representation,
        rest: Representation,
        observer: Observer,
        manner: Manner,
    ):
        self.collection, self.representation, self.rest, self.observer = collection, representation, rest, observer
        self.manner = manner
        self.parts: dict[int, Curvature] = {}
        self._place: dict[str, int] = {}
        self._left: set[str] = set()  # to ``rest``, by another process
        self._settled: tuple | None = None  # the structure of the batch that the parts were made for

    def __iter__(self):
        return iter(self.parts.values())

    @property
    def wants_every_batch(self) -> bool:
        """Whether some part follows the rows of every batch."""
        return any(part.wants_every_batch for part in self)

    def observe(self, chunk: Chunk, schedule: Schedule) -> None:
        """Hand the rows of some examples to the parts they belong to."""
        self._assign(chunk)
        for part in self:
            part.observe(chunk, schedule)

    @property
    def rest_names(self) -> list[str]:
        """The parameters that the chosen representation cannot hold."""
        return [name for name, index in self._place.items() if index == REST]

    def leave(self, names: set[str]) -> None:
        """Parameters called ``names`` are among these from now on."""
        self._left |= names
        self._settled = None

    def forget(self) -> None:
        """Drop what was observed since the last step."""
        for part in self:
            part.forget()

    def _assign(self, chunk: Chunk) -> None:
        """Which part each parameter belongs to; parts whose parameters change start anew."""
        structure = tuple(chunk.jacobians), frozenset(self.observer.batchwise)
        if structure == self._settled:
            return
        self._settled = structure
        place = {name: self.representation.part_of(name) for name in self.collection.names}
        for layout, j in chunk.jacobians.items():
            kept = self._representation(place[layout.names[0]])
            if not self.observer.batchwise.isdisjoint(layout.names) or not kept.takes(j):
                place.update(dict.fromkeys(layout.names, REST))
        place |= {name: REST for name, index in self._place.items() if index == REST} | dict.fromkeys(self._left, REST)
        if place != self._place:
            self._build(place)

    def _build(self, place: dict[str, int]) -> None:
        members: dict[int, list[str]] = {}
        for name in self.collection.names:
            members.setdefault(place[name], []).append(name)
        parts = {}
        for index, names in members.items():
            old = self.parts.get(index)
            parts[index] = (
                old
                if old is not None and list(old.selection.names) == names
                else self._part(index, Selection(self.collection, tuple(names), self.manner.team))
            )
        self.parts, self._place = parts, place

    def _part(self, index: int, selection: Selection) -> Curvature:
        representation = self._representation(index)
        return keeper(representation)(representation, selection, replace(self.manner, eager=index == REST))

    def _representation(self, index: int) -> Representation:
        return self.rest if index == REST else self.representation.member(index)

    def state(self) -> dict[int, Any]:
        """Plain values and tensors of every part."""
        return {index: part.state() for index, part in self.parts.items()}

    def load(self, state: dict[int, Any]) -> None:
        """The inverse of :meth:`state`; raises :class:`ArgumentError` for other parameters."""
        place = {name: index for index, part in state.items() for name in part["names"]}
        odd = sorted(set(place) ^ set(self.collection.names)) if place else []
        if odd:
            raise ArgumentError(f"the state belongs to other parameters; they differ in {odd[:4]}")
        self.parts, self._place, self._settled = {}, {}, None
        if place:
            self._build(place)
            for index, part in state.items():
                self.parts[index].load(part)
