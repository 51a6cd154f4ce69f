"""What an optimizer keeps of the curvature of some parameters: statistics in, preconditioned gradients out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from nngeom.core.damping import Damping, Relative
from nngeom.core.errors import NonFiniteError, UnsupportedError
from nngeom.core.layout import Layout
from nngeom.core.statistic import Sums
from nngeom.optim.averages import Averages, all_finite, plain_blocks, restored_blocks, scaled_means
from nngeom.optim.drowned import Drowned
from nngeom.optim.inverses import inverses
from nngeom.optim.manner import Manner
from nngeom.optim.packed import Packed
from nngeom.optim.pending import Seen, copied
from nngeom.optim.rank import BatchRank
from nngeom.optim.schedule import Schedule
from nngeom.optim.stacks import Stacks, arranged
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Means, Selection, Statistic
from nngeom.pmat.representation import Representation
from nngeom.ranks.team import ALONE
from nngeom.sweep.sweep import Chunk


class Curvature(ABC):
    """What is kept of the curvature of one part of the parameters, and what it does to their gradient.

    Subclasses say :meth:`observe` and :meth:`precondition`, and register under :func:`keeps`. ``pending`` are sums
    since the last step (``pending.add(statistic, chunk)``), ``averages`` running means of them
    (``averages.take(pending, seen.examples, seen.scale, schedule.decay)``, ``averages.read()``), ``blocks`` what
    preconditions: nothing was observed where there are none. The last two are saved and loaded with the optimizer, and
    may be kept by another process alone, which is sent the sums: :attr:`known` then says whether it has blocks.

    Args:
        representation: the class of matrices, and its options.
        selection: the parameters.
        manner: what the optimizer's options say.
    """

    tells_variances: ClassVar[bool] = False  # of examples along eigenvectors, where it reads their rows

    def __init__(self, representation: Representation, selection: Selection, manner: Manner):
        self.representation, self.selection, self.manner = representation, selection, manner
        self.averages = Averages()
        self.blocks: dict[Layout, Any] = {}
        self.elsewhere = False  # another process keeps blocks of these parameters
        self._packed: Packed | None = None
        self.rank = BatchRank(on=manner.team.size == 1 and not manner.own_rows)
        self.forget()

    def forget(self) -> None:
        """Drop what was observed since the last step."""
        self.pending = Sums()
        self.rank.forget()

    def finite(self) -> bool:
        """Whether what was observed is free of NaN and infinity."""
        return all_finite(self.pending)

    @property
    def wants_every_batch(self) -> bool:
        """Whether the rows of batches are taken in whose statistics are not due."""
        return False

    @property
    def wants_statistics(self) -> bool:
        """Whether those of batches are whose statistics are."""
        return True

    @property
    def mine(self) -> bool:
        """Whether this process keeps what there is."""
        return self.manner.owner in (None, self.manner.team.rank)

    @property
    def known(self) -> bool:
        """Whether there are blocks, here or with the process that keeps them."""
        return bool(self.blocks) or self.elsewhere

    def why_not_owned(self) -> str | None:
        """What stands against one process keeping this for all, by sums of the others', if something does."""
        return f"{self.representation.kind.__name__}, as {type(self).__name__} keeps it"

    def own(self, owner: int) -> None:
        """From now on the process ``owner`` keeps this for all."""
        self.manner = replace(self.manner, owner=owner)
        self.selection = replace(self.selection, team=ALONE)

    @abstractmethod
    def observe(self, chunk: Chunk, schedule: Schedule) -> None:
        """Take in the rows of some examples, ``chunk``, gradients as they were backpropagated, where the ``schedule``
        wants them.
        """

    @abstractmethod
    def precondition(self, gradient: Tensor, seen: Seen, schedule: Schedule) -> None:
        """Bring averages, inverses and bases up to date, and precondition these parameters' part of ``gradient [d]`` in
        place; ``seen``: what was observed since the last step; ``schedule``: what is due at it, and the damping.
        """

    def packed(self, vector: Tensor) -> Packed:
        """Room for the blocks of these parameters, filled from the ``vector``; ``write()`` brings it back."""
        if self._packed is None or self._packed.vector is not vector or self._packed.layouts != tuple(self.blocks):
            self._packed = Packed(self.blocks, vector)
        self._packed.read()
        return self._packed

    def state(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "names": list(self.selection.names),
            "averages": self.averages.plain(),
            "blocks": plain_blocks(self.blocks),
            "rank": self.rank.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a ``state``, as :meth:`state` gave it."""
        self.averages, self.blocks = Averages.restored(state["averages"]), restored_blocks(state["blocks"])
        if "rank" in state:
            self.rank.load(state["rank"])


KEEPERS: dict[type[PMat], type[Curvature]] = {}
Kept = TypeVar("Kept", bound=Curvature)


def keeps(*kinds: type[PMat]) -> Callable[[type[Kept]], type[Kept]]:
    """A decorator: this :class:`Curvature` keeps matrices of these ``kinds``, and of their subclasses, in training."""

    def register(curvature: type[Kept]) -> type[Kept]:
        KEEPERS.update(dict.fromkeys(kinds, curvature))
        return curvature

    return register


def keeper(representation: Representation) -> type[Curvature]:
    """How a representation is kept: as the nearest of its classes says, or by its recipe where that is its own."""
    if type(representation).recipe is Representation.recipe:
        for kind in representation.kind.__mro__:
            if kind in KEEPERS:
                return KEEPERS[kind]
            if "recipe" in vars(kind):
                break
    return Averaged


class Averaged(Curvature):
    """Any representation, by its recipe: averages of its statistics, and inverses of its blocks that stay for a while.

    ``blocks`` are the inverses. Where the recipe takes several sweeps, the first is sent the averages; the others are
    over the examples seen since the last step, which are held where a refresh is due.
    """

    def __init__(self, representation: Representation, selection: Selection, manner: Manner):
        super().__init__(representation, selection, manner)
        self.statistic = next(representation.recipe(selection))
        self.several = representation.passes > 1
        self.sources: set[Layout] = set()  # what the blocks were made from

    def forget(self):
        super().forget()
        self.held: list[Chunk] = []

    def why_not_owned(self):
        if type(self) is not Averaged:
            return super().why_not_owned()
        sweeps = self.representation.passes
        return f"a representation of {sweeps} sweeps, which need its blocks everywhere" if self.several else None

    @property
    def wants_every_batch(self):
        return self.rank.wanted and any(
            isinstance(block, KroneckerBlock) or (isinstance(block, Drowned) and self.rank.pays(layout, block.costs))
            for layout, block in self.blocks.items()
        )

    def observe(self, chunk, schedule):
        chunk = self.selection.restrict(chunk)
        if not self.known or self.wants_every_batch:
            self.rank.observe(chunk)
        if not schedule.statistics and self.known:
            return
        self.pending.add(self.statistic, chunk)
        if self.several and self._due(schedule):
            self.held.append(copied(chunk))

    def _due(self, schedule: Schedule) -> bool:
        return schedule.refresh or self.manner.eager or not self.blocks

    def precondition(self, gradient, seen, schedule):
        fresh = bool(self.pending.sums)
        if fresh:
            self.averages.take(self.pending, seen.examples, seen.scale, schedule.decay)
        known = self.averages.entries.keys()
        due = schedule.refresh or (self.manner.eager and fresh) or not self.blocks or not known <= self.sources
        if known and due and (self.held or not self.several):
            self._refresh(schedule.damping, seen)
        if self.blocks:
            packed = self.packed(gradient)
            self.stacks.product(packed.blocks, packed.blocks)
            for (layout, inverse), x in self.stacks.others(self.blocks.items(), packed.blocks):
                if isinstance(inverse, KroneckerBlock):
                    x.copy_(self.rank.product(layout, inverse.g, x, inverse.a))
                elif isinstance(inverse, Drowned):
                    x.copy_(inverse.product(x, self.rank.of(layout, x, inverse.costs)))
                else:
                    x.copy_(inverse.mv(x))
            packed.write()
        self.forget()

    def _refresh(self, damping: Damping | Relative, seen: Seen) -> None:
        recipe, means = self.representation.recipe(self.selection), self.averages.read()
        next(recipe)
        try:
            while True:
                means = self._later(recipe.send(means), seen)
        except StopIteration as end:
            self.blocks = arranged(inverses(self.manner, end.value, damping))
        self._stack()
        self.sources = set(self.averages.entries)

    def _stack(self) -> None:
        sides = {lay: (x.g, x.a) if isinstance(x, KroneckerBlock) else (None, None) for lay, x in self.blocks.items()}
        self.stacks = Stacks(sides)

    def _later(self, statistic: Statistic, seen: Seen) -> Means:
        """What a later sweep is sent: means over the examples that are held."""
        if not self.several:
            name = self.representation.kind.__name__
            raise UnsupportedError(
                f"{name} takes a second sweep over the examples of a step, which are not held for it, because the "
                f"class says passes = {self.representation.passes}: set passes = 2 in it, or the number of its sweeps"
            )
        sums = Sums()
        for chunk in self.held:
            sums.add(statistic, chunk)
        sums = seen.joined(sums)
        if not all_finite(sums):
            raise NonFiniteError("the statistics of a later sweep are not finite")
        return scaled_means(sums, max(seen.examples, 1), seen.scale)

    def load(self, state):
        super().load(state)
        self._stack()
        self.sources = set(self.averages.entries)
