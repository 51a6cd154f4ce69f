"""EKFAC's curvature along training: eigenbases that are kept for a while, and a spectrum in them that follows every
step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from nngeom.core.damping import Cutoff, Damping, FactoredTikhonov
from nngeom.core.errors import NonFiniteError
from nngeom.core.layout import Layout
from nngeom.core.statistic import Sums
from nngeom.optim.averages import all_finite, scaled_means
from nngeom.optim.curvature import Curvature, Manner, copied, keeps
from nngeom.optim.packed import Packed, split
from nngeom.optim.pending import Seen
from nngeom.optim.schedule import Schedule
from nngeom.pmat.eigenbases import eigenbases as bases_of
from nngeom.pmat.ekfac import PMatEKFAC, scaling_statistic
from nngeom.pmat.kfac import kronecker_blocks
from nngeom.pmat.kronecker import EigenBlock
from nngeom.pmat.recipe import Selection
from nngeom.pmat.representation import Representation
from nngeom.ranks.team import ALONE, Team
from nngeom.sweep.sweep import Chunk


@keeps(PMatEKFAC)
class Eigenbasis(Curvature):
    """Eigenbases of averaged Kronecker factors, and second moments along them.

    ``scalings="batch"``: of the batch's examples (George et al. 2018, Algorithm 1). ``"running"``: EKFAC-ra,
    ``s <- decay s + (1 - decay) n v^2`` with ``v`` the gradient of the mean loss in the basis, ``s`` starting from the
    factors' eigenvalues at every refresh; under a metric whose rows are not the loss's, the batch's second moments take
    the place of ``n v^2``. Second moments taken in different bases are never averaged.
    """

    def __init__(self, representation: Representation, selection: Selection, manner: Manner):
        super().__init__(representation, selection, manner)
        self.statistic: Callable = next(representation.recipe(selection))
        self.running, self.worker = manner.scalings == "running", manner.worker
        self.from_gradient = self.running and not manner.own_rows
        self.sources: set[Layout] = set()  # layers that have a basis
        self.future: Future | None = None

    def forget(self):
        super().forget()
        self.squares = Sums()
        self.held: list[Chunk] = []

    def finite(self):
        return super().finite() and all_finite(self.squares)

    # -- observing -----------------------------------------------------------------------------------------------------

    @property
    def wants_every_batch(self):
        return not self.from_gradient

    def observe(self, chunk, schedule):
        if not self.from_gradient and not self.squares.sums:
            self._adopt()
        chunk = self.selection.restrict(chunk)
        if schedule.statistics or not self.blocks:
            self.pending.add(self.statistic, chunk)
        if self.from_gradient:
            return
        if self._waits_for_basis(schedule):
            self.held.append(copied(chunk))
        else:
            self._square(chunk)

    def _waits_for_basis(self, schedule: Schedule) -> bool:
        return not self.blocks or (schedule.refresh and self.worker is None)

    def _square(self, chunk: Chunk) -> None:
        known = {lay: j for lay, j in chunk.jacobians.items() if lay in self.sources}
        self.squares.add(scaling_statistic(self.blocks), dataclasses.replace(chunk, jacobians=known))

    # -- bases ---------------------------------------------------------------------------------------------------------

    def _refresh(self, schedule: Schedule) -> None:
        fresh = self.averages.entries.keys() - self.sources
        if not self.averages.entries or not (schedule.refresh or fresh):
            return
        if self.worker is None or fresh:
            self._install(eigenbases(self.averages.read(), self.manner.team))
            self.sources = set(self.averages.entries)
        elif self.future is None:
            self.future = self.worker.submit(eigenbases, self.averages.read())

    def _adopt(self) -> None:
        """Take over bases that a background thread has finished, before anything is projected on them."""
        if self.future is not None and self.future.done():
            self._install(self.future.result())
            self.future = None

    def _install(self, blocks: dict[Layout, EigenBlock]) -> None:
        """New bases; the spectra of all blocks are views of one vector, which the steps to come change in place."""
        self.spectrum = torch.cat([block.d.reshape(-1) for block in blocks.values()])
        views = split(self.spectrum, tuple(blocks))
        self.blocks = {layout: dataclasses.replace(block, d=d) for (layout, block), d in zip(blocks.items(), views)}
        self._shift: tuple[Damping, Tensor] | None = None  # damping of every coordinate, while bases and damping stay

    def load(self, state):
        super().load(state)
        self.sources = set(self.averages.entries)
        if self.blocks:
            self._install(self.blocks)

    # -- stepping ------------------------------------------------------------------------------------------------------

    def precondition(self, gradient, seen, schedule):
        if self.from_gradient:
            self._adopt()
        if self.pending.sums:
            self.averages.take(self.pending, seen.examples, seen.scale, schedule.decay)
        self._refresh(schedule)
        for chunk in self.held:
            self._square(chunk)
        if not self.from_gradient:
            self.squares = seen.joined(self.squares)
        if self.blocks:
            bases = [block.basis for block in self.blocks.values()]
            packed = self.packed(gradient)
            for x, basis in zip(packed.blocks, bases):
                x.copy_(basis.tmv(x))
            self._follow(packed.flat, seen, schedule.scalings_decay if self.running else 0.0)
            self._divide(packed, schedule.damping)
            for x, basis in zip(packed.blocks, bases):
                x.copy_(basis.mv(x))
            packed.write()
        self.forget()

    def _follow(self, v: Tensor, seen: Seen, past: float) -> None:
        """The spectrum takes in what this step has seen; ``v`` is the gradient in the bases."""
        if self.from_gradient:
            spectrum = (self.spectrum * past).addcmul_(v, v, value=(1 - past) * seen.examples * seen.mean**2)
            if not bool(
                torch.isfinite(spectrum.sum())
            ):  # infinity would stay, and stop these coordinates without a word
                raise NonFiniteError("the squared gradient in the eigenbasis overflows")
            self.spectrum.copy_(spectrum)
            return
        for layout, t in scaled_means(self.squares, max(seen.examples, 1), seen.scale).items():
            self.blocks[layout].d.mul_(past).add_(t["d"], alpha=1 - past)

    def _divide(self, packed: Packed, damping: Damping) -> None:
        """By ``d + damping``; where damping is positive the sum needs no check, and its constant part is kept."""
        if isinstance(damping, Cutoff) or damping.value == 0:
            for x, block in zip(packed.blocks, self.blocks.values()):
                x.mul_(block.inverse(damping).d)
            return
        if self._shift is None or self._shift[0] != damping:
            shifts = [
                block.additive(damping.value) if isinstance(damping, FactoredTikhonov) else damping.value
                for block in self.blocks.values()
            ]
            self._shift = (
                damping,
                torch.cat([(torch.zeros_like(b.d) + x).view(-1) for b, x in zip(self.blocks.values(), shifts)]),
            )
        packed.flat.div_(self.spectrum + self._shift[1])


def eigenbases(means: dict[Layout, dict[str, Tensor]], team: Team = ALONE) -> dict[Layout, EigenBlock]:
    """The eigenbases of Kronecker factors, with the spectrum of their product."""
    return bases_of(kronecker_blocks(means), team)
