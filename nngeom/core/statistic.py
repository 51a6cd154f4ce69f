"""Sums over examples, kept apart from their count, so that batches, shards and data sets merge by adding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.kept import Kept, Key
from nngeom.core.linalg import accumulation_dtype
from nngeom.core.widened import widened


@dataclass
class Stacked:
    """A statistic that is stacked instead of summed: ``parts``, rows ``[r, p]`` whose Gram matrix is averaged."""

    parts: list[Tensor]


@dataclass
class Moment:
    """A statistic ``scale * x^T x`` of rows ``x [r, p]``, multiplied where it is added: as ``[*lead, p, p]`` with ones
    in ``lead``.
    """

    x: Tensor
    lead: tuple[int, ...] = ()
    scale: float = 1.0

    def added_to(self, total: Tensor | None) -> Tensor:
        """``total`` in place, but for entries below the diagonal, which :func:`linalg.mirror_` completes."""
        p = self.x.shape[1]
        total = None if total is None else total.view(p, p)
        return linalg.add_gram_(total, widened(self.x), self.scale).view(*self.lead, p, p)


@dataclass
class Inputs:
    """Marks a statistic of inputs alone, which does not depend on cotangents: the input side of a Kronecker product.

    It is counted once a batch, however many chunks of cotangents the batch is cut into, and stays as it is where
    gradients are rescaled. ``of``: the tensor or :class:`Moment`, or a function that makes it, called when it counts.
    """

    of: Tensor | Moment | Callable[[], Tensor | Moment]

    def value(self) -> Tensor | Moment:
        """What is added."""
        return self.of if isinstance(self.of, (Tensor, Moment)) else self.of()


Named = Mapping[
    Any, Mapping[str, Tensor | Stacked | Moment | Inputs]
]  # {block: {name of the statistic: what is added}}


def names_of(block: Any) -> list[str]:
    """The parameters of a block, or what the statistic calls it."""
    while isinstance(block, tuple) and block:
        block = block[-1]
    return list(getattr(block, "names", [str(block)]))


class Part(Protocol):
    """The part of a batch that a statistic is taken of."""

    @property
    def examples(self) -> int:
        """Its examples."""

    @property
    def first(self) -> bool:
        """Whether these are the first cotangents of its examples."""


ChunkT = TypeVar("ChunkT", bound=Part)


@dataclass
class Sums:
    """``{block: {name: sum over examples}}`` and the number of examples seen.

    ``inputs``: the blocks and names of sums of :class:`Inputs`. All others are second moments of gradients: sums of
    their products in pairs, or :class:`Stacked` of them.
    """

    count: int = 0
    inputs: set[tuple[Any, str]] = field(default_factory=set)
    _sums: dict[Any, dict[str, Tensor | Stacked]] = field(default_factory=dict)
    _halves: set[tuple[Any, str]] = field(default_factory=set)  # moments whose lower half is not there yet

    @property
    def sums(self) -> dict[Any, dict[str, Tensor | Stacked]]:
        """The sums so far."""
        for block, name in self._halves:
            t: Any = self._sums[block][name]
            if len(linalg.strips(t.shape[-1])) > 1:
                linalg.mirror_(t.flatten(0, -2))
        self._halves.clear()
        return self._sums

    def add(self, statistic: Callable[[ChunkT], Named], chunk: ChunkT) -> None:
        """Add the statistic of a chunk; examples are counted, and :class:`Inputs` taken, with their first cotangents.

        The first tensor of a name is not copied where that is not needed: it becomes the sum.
        """
        taken = set[int]()
        for block, parts in statistic(chunk).items():
            for name, t in parts.items():
                if isinstance(t, Inputs):
                    self.inputs.add((block, name))
                    if chunk.first:
                        self._add(block, name, t.value(), taken)
                else:
                    self._add(block, name, t, taken)
        if chunk.first:
            self.count += chunk.examples

    def _add(self, block: Any, name: str, t: Tensor | Stacked | Moment, taken: set[int] | None) -> None:
        """``taken``: storages that became sums in this call and that no second sum may share; ``None``: copy ``t``."""
        mine = self._sums.setdefault(block, {})
        held = mine.get(name)
        if isinstance(t, Stacked):
            mine[name] = Stacked([*(held.parts if isinstance(held, Stacked) else []), *t.parts])
        elif isinstance(t, Moment):
            mine[name] = t.added_to(held)  # type: ignore[arg-type]
            self._halves.add((block, name))
        elif isinstance(held, Tensor):
            if t is held:  # a constant, handed over in every chunk
                mine[name] = held + t
            else:
                held += t
        else:
            wide, place = accumulation_dtype(t.dtype), t.untyped_storage().data_ptr()
            if t.dtype == wide and (taken is None or t._base is not None or place in taken):
                t = t.clone()
            elif t.dtype == wide and taken is not None:
                taken.add(place)
            mine[name] = t.to(wide)

    def merge(self, others: Iterable[Sums]) -> Sums:
        """The sums over all examples seen by any of them, which stay as they are."""
        for other in others:
            self.inputs |= other.inputs
            for block, parts in other.sums.items():
                for name, t in parts.items():
                    self._add(block, name, t, None)
            self.count += other.count
        return self

    def share_inputs(self, other: Sums) -> None:
        """Take over the count and the :class:`Inputs` of the same examples under other cotangents."""
        for block, name in other.inputs:
            self._sums.setdefault(block, {})[name] = other.sums[block][name]
        self.inputs, self.count = set(other.inputs), other.count

    def scale_(self, c: float) -> None:
        """As if every gradient had been ``c`` times as large; sums of inputs stay."""
        for block, named in self._sums.items():
            for name, t in named.items():
                if isinstance(t, Stacked):
                    t.parts = [c * part for part in t.parts]
                elif (block, name) not in self.inputs:
                    t.mul_(c * c)

    # -- in several processes ------------------------------------------------------------------------------------------

    def kept(self) -> dict[Key, Kept]:
        """What there is, in the order in which it was met."""
        return {(block, name): self._kept(block, name) for block, named in self._sums.items() for name in named}

    def _kept(self, block: Any, name: str) -> Kept:
        t, inputs = self._sums[block][name], (block, name) in self.inputs
        if isinstance(t, Stacked):
            return Kept(tuple(t.parts[0].shape[1:]), t.parts[0].dtype, stacked=True, inputs=inputs)
        return Kept(tuple(t.shape), t.dtype, half=(block, name) in self._halves, inputs=inputs)

    def adopt(self, kept: Mapping[Key, Kept], device: torch.device) -> None:
        """What ``kept`` lists, in its order, with zeros on ``device`` for what was not met here."""
        mine, halves = self._sums, set(self._halves)
        self._halves = {key for key in halves if not kept[key].half}
        mine, self._sums = self.sums, {}
        for (block, name), k in kept.items():
            t = mine.get(block, {}).get(name)
            if k.stacked:
                parts = t.parts if isinstance(t, Stacked) else [torch.zeros(0, *k.shape, device=device)]
                t = Stacked([torch.cat(parts).to(k.dtype)])
            else:
                t = t.to(k.dtype) if isinstance(t, Tensor) else torch.zeros(k.shape, dtype=k.dtype, device=device)
            self._sums.setdefault(block, {})[name] = t
        self._halves = {key for key, k in kept.items() if k.half}
        self.inputs = {key for key, k in kept.items() if k.inputs}

    def addends(self) -> list[Tensor]:
        """Views of all that is summed, without what is below the diagonal and not there yet."""
        out: list[Tensor] = []
        for block, named in self._sums.items():
            for name, t in named.items():
                if isinstance(t, Tensor) and (block, name) in self._halves:
                    square = t.flatten(0, -2)
                    out += [square[lo:hi, lo:] for lo, hi in linalg.strips(t.shape[-1])]
                elif isinstance(t, Tensor):
                    out.append(t)
        return out

    def stacks(self) -> list[Stacked]:
        """All that is stacked."""
        return [t for named in self._sums.values() for t in named.values() if isinstance(t, Stacked)]

    # -- read ----------------------------------------------------------------------------------------------------------

    def mean(self, *, used_up: bool = False) -> dict[Any, dict[str, Tensor]]:
        """Sums divided by the number of examples; rows stacked and divided by its square root. ``used_up``: the sums
        are given up for it.
        """
        return {
            block: {name: self._mean(t, used_up=used_up) for name, t in tensors.items()}
            for block, tensors in self.sums.items()
        }

    def _mean(self, t: Tensor | Stacked, *, used_up: bool) -> Tensor:
        if isinstance(t, Stacked):
            result: Tensor = torch.cat(t.parts) / self.count**0.5
            return result
        return t.div_(self.count) if used_up and t.is_floating_point() else t / self.count
