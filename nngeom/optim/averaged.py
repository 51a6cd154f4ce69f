"""Any representation in training, by its recipe; and which representation is kept otherwise."""

from __future__ import annotations

from nngeom.core.damping import Damping, Relative
from nngeom.core.errors import NonFiniteError, UnsupportedError
from nngeom.core.layout import Layout
from nngeom.core.statistic import Sums
from nngeom.optim.averages import are_finite, scaled_means
from nngeom.optim.curvature import KEEPERS, Curvature
from nngeom.optim.drowned import Drowned
from nngeom.optim.inverses import inverses
from nngeom.optim.manner import Manner
from nngeom.optim.pending import Seen, copied
from nngeom.optim.schedule import Schedule
from nngeom.optim.stacks import Stacks, arranged
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.recipe import Means, Selection, Statistic
from nngeom.pmat.representation import Representation
from nngeom.sweep.sweep import Chunk


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
            singly = not self.rank.rows
            self.stacks.product(packed.blocks, packed.blocks, singly=singly)
            for (layout, inverse), x in self.stacks.others(self.blocks.items(), packed.blocks, singly=singly):
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
        if not are_finite(sums):
            raise NonFiniteError("the statistics of a later sweep are not finite")
        return scaled_means(sums, max(seen.examples, 1), seen.scale)

    def load(self, state):
        super().load(state)
        self._stack()
        self.sources = set(self.averages.entries)


def keeper(representation: Representation) -> type[Curvature]:
    """How a representation is kept: as the nearest of its classes says, or by its recipe where that is its own."""
    if type(representation).recipe is Representation.recipe:
        for kind in representation.kind.__mro__:
            if kind in KEEPERS:
                return KEEPERS[kind]
            if "recipe" in vars(kind):
                break
    return Averaged
