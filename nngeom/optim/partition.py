"""Which representation keeps the curvature of which parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nngeom.core.errors import ArgumentError, UnsupportedError
from nngeom.optim.averaged import keeper
from nngeom.optim.curvature import Curvature
from nngeom.optim.manner import Manner
from nngeom.optim.owners import Owners
from nngeom.optim.schedule import Schedule
from nngeom.optim.states import part_state, resume
from nngeom.pmat.recipe import Selection
from nngeom.pmat.representation import Representation
from nngeom.space.collection import LayerCollection
from nngeom.sweep.observe import Observer
from nngeom.sweep.sweep import Chunk

Key = Any  # of a part: its index, or where processes keep layers of their own (index, rank)
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
        owners: Owners,
    ):
        self.collection, self.representation, self.rest, self.observer = collection, representation, rest, observer
        self.manner, self.owners = manner, owners
        self._split, self.nbytes = owners.apart or owners.open, 0  # by owners; what blocks take
        self.parts: dict[Key, Curvature] = {}
        self._place: dict[str, int] = {}
        self._left: set[str] = set()  # to ``rest``, by another process
        self._settled: tuple | None = None  # the structure of the batch that the parts were made for
        self._require_owners()

    def __iter__(self):
        return iter(self.parts.values())

    @property
    def wants_every_batch(self) -> bool:
        """Whether some part follows the rows of every batch."""
        return any(part.wants_every_batch for part in self)

    @property
    def wants_statistics(self) -> bool:
        """Whether some part takes in those of batches whose statistics are due."""
        return not self.parts or any(part.wants_statistics for part in self)

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
        if self._split:
            self._look(chunk, place)

    def _build(self, place: dict[str, int]) -> None:
        members: dict[Key, list[str]] = {}
        first: dict[int, int] = {}  # who keeps a part that is not of layers
        for name in self.collection.names:
            key: Key = place[name]
            if self._split:
                owner = self.owners.of(name)
                apart = self._representation(key).blocks_in_layers
                key = key, owner if apart else first.setdefault(key, owner)
            members.setdefault(key, []).append(name)
        parts = {}
        for key, names in members.items():
            old = self.parts.get(key)
            parts[key] = (
                old if old is not None and list(old.selection.names) == names else self._part(key, tuple(names))
            )
        self.parts, self._place = parts, place

    def _part(self, key: Key, names: tuple[str, ...]) -> Curvature:
        index, owner = key if isinstance(key, tuple) else (key, None)
        manner = replace(self.manner, eager=index == REST, owner=owner if self.owners.apart else None)
        representation = self._representation(index)
        return keeper(representation)(representation, Selection(self.collection, names, manner.makers), manner)

    def _representation(self, index: int) -> Representation:
        return self.rest if index == REST else self.representation.member(index)

    # -- processes that keep layers of their own -----------------------------------------------------------------------

    def _require_owners(self) -> None:
        """Raise :class:`UnsupportedError` where one process cannot keep a part for all; ``"auto"`` is decided then."""
        indices = sorted({REST, *map(self.representation.part_of, self.collection.names)}) if self._split else []
        for index in indices:
            why = self._part(index, self.collection.names).why_not_owned()
            if why is not None and self.owners.apart:
                raise UnsupportedError(f"placement='owned' is not offered for {why}; use placement='replicated'")
            if why is not None:
                self.owners.placement, self._split = "replicated", False

    def _look(self, chunk: Chunk, place: dict[str, int]) -> None:
        """Make sure that blocks are each of one process, and count what they take."""
        numbers = 0
        for layout, j in chunk.jacobians.items():
            index = place[layout.names[0]]
            representation = self._representation(index)
            if representation.blocks_in_layers:
                self.owners.require_block(layout)
            names = tuple(name for name in self.collection.names if place[name] == index)
            numbers += representation.entries_of(layout, j, Selection(self.collection, names)) or 0
        self.nbytes = 2 * numbers * self.observer.network.dtype.itemsize  # averages, and inverses or bases

    def decide(self) -> None:
        """Whether processes keep layers of their own, where that is open; all of them together."""
        if self.owners.open:
            self.owners.decide(self.nbytes, self.observer.network.device)
            for (_, owner), part in self.parts.items() if self.owners.apart else ():
                part.own(owner)

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self) -> dict[Any, Any]:
        """Plain values and tensors of every part; of those that other processes keep, their names."""
        return dict(part_state(key, part) for key, part in self.parts.items())

    def load(self, state: dict[Any, Any]) -> None:
        """The inverse of :meth:`state`, or of several processes' joined; raises :class:`ArgumentError` for other
        parameters, or where what another process kept is missing.
        """
        entries = [(entry.get("part", key), entry) for key, entry in state.items()]
        place = {name: index for index, entry in entries for name in entry["names"]}
        odd = sorted(set(place) ^ set(self.collection.names)) if place else []
        if odd:
            raise ArgumentError(f"the state belongs to other parameters; they differ in {odd[:4]}")
        if self.owners.open and any(entry.get("owned") for _, entry in entries):
            self.owners.placement = "owned"
        self.parts, self._place, self._settled = {}, {}, None
        if place:
            self._build(place)
        for key, part in self.parts.items():
            index = key[0] if isinstance(key, tuple) else key
            resume(part, [entry for i, entry in entries if i == index])
