"""Curvature in Kronecker-factored eigenbases along training: bases that are kept for a while, and a spectrum in them
that follows every step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from nngeom.core.errors import UnsupportedError
from nngeom.core.layout import Layout
from nngeom.core.statistic import Sums
from nngeom.optim.averages import are_finite, scaled_means
from nngeom.optim.bases import Bases, Kept, moved, turns
from nngeom.optim.curvature import Curvature, keeps
from nngeom.optim.gradient_factors import GradientFactors
from nngeom.optim.heads import Head, Parts
from nngeom.optim.manner import Manner
from nngeom.optim.packed import Packed
from nngeom.optim.pending import Seen, copied
from nngeom.optim.schedule import Schedule
from nngeom.optim.shifts import Shifts, Tail, views
from nngeom.optim.spectra import spectrum_of
from nngeom.optim.stacks import Stacks, arranged
from nngeom.optim.variance_damping import Signal
from nngeom.pmat.ekfac import PMatEKFAC, scaling_statistic
from nngeom.pmat.recipe import Selection
from nngeom.pmat.representation import Representation
from nngeom.sweep.sweep import Chunk


@keeps(PMatEKFAC)
class Eigenbasis(Curvature):
    """Eigenbases of averaged Kronecker factors, of rows or of gradients, and a :class:`Spectrum` along them.

    Second moments taken in different bases are never averaged, unless they are moved along.
    """

    tells_variances = True

    def __init__(self, representation: Representation, selection: Selection, manner: Manner):
        super().__init__(representation, selection, manner)
        if "low_rank" in representation.settings.get("factor_form", ()):
            raise UnsupportedError(
                "bases of factor_form='low_rank' are not followed in training; expected 'diagonal' or 'block', or "
                "NaturalGradient(model, PMatKFAC.options(factor_form='low_rank'))"
            )
        self.statistic: Callable = next(representation.recipe(selection))
        self.spectrum, self.worker, self.shifts = spectrum_of(manner), manner.worker, Shifts()
        self.signal = Signal()
        self.bases = Bases(
            manner.refresh,
            manner.drowned if self.spectrum.factored else 0.0,
            manner.makers,
            values=self.spectrum.starts_anew,
        )
        self.of_gradients = GradientFactors() if manner.factors == "gradients" else None
        self.sources: set[Layout] = set()  # layers that have a basis
        self.future: Future | None = None

    def forget(self):
        super().forget()
        self.squares = Sums()
        self.held: list[Chunk] = []

    def finite(self):
        return super().finite() and are_finite(self.squares)

    def why_not_owned(self):
        if type(self) is not Eigenbasis:
            return super().why_not_owned()
        if self.spectrum.reads_rows:
            return "second moments of examples in the bases (scalings='running', 'factors' or 'adam' are offered, of "
            "fisher='empirical')"
        return None

    def own(self, owner):
        super().own(owner)
        self.bases = dataclasses.replace(self.bases, team=self.manner.makers)

    # -- observing -----------------------------------------------------------------------------------------------------

    @property
    def wants_every_batch(self):
        return self.spectrum.reads_rows or self.rank.wanted

    @property
    def wants_statistics(self):
        return self.of_gradients is None or not self.of_gradients.knows(self.selection.names)

    def observe(self, chunk, schedule):
        if self.spectrum.reads_rows and not self.squares.sums:
            self._adopt()
        chunk = self.selection.restrict(chunk)
        if self.of_gradients is not None:
            self.of_gradients.observe(chunk)
        elif schedule.statistics or not self.known:
            self.pending.add(self.statistic, chunk)
        self.rank.observe(chunk)
        if not self.spectrum.reads_rows:
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
        task = self.averages.read(), schedule.damping, dict(self.blocks)
        if self.worker is None or fresh:
            self._install(arranged(self.bases.of(*task)))
            self.sources = set(self.averages.entries)
        elif self.future is None:
            self.future = self.worker.submit(self.bases.of, *task)

    def _adopt(self) -> None:
        """Take over bases that a background thread has finished, before anything is projected on them."""
        if self.future is not None and self.future.done():
            self._install(arranged(self.future.result()))
            self.future = None

    def _install(self, blocks: dict[Layout, Kept]) -> None:
        """New bases; the spectra of all blocks are views of one vector, which the steps to come change in place."""
        old = self.blocks
        turn = functools.cache(lambda layout: turns(old[layout], blocks[layout]))

        def along(x: Tensor, *, squared: bool = False) -> Tensor:
            parts = dict(zip(old, views(x, old)))  # in the order of a state that was joined, perhaps
            return torch.cat([moved(parts[lay], turn(lay), squared=squared).reshape(-1) for lay in blocks])

        start = torch.cat([block.d.reshape(-1) for block in blocks.values()])
        self.spectrum.start(start, along if old.keys() == blocks.keys() else None)
        self._share(blocks)

    def _share(self, blocks: dict[Layout, Kept]) -> None:
        spectra = views(self.spectrum.d, blocks)
        self.blocks = {layout: dataclasses.replace(block, d=d) for (layout, block), d in zip(blocks.items(), spectra)}
        self.coordinates = torch.empty_like(self.spectrum.d)
        self.places = views(self.coordinates, blocks)
        sides = {layout: (None, None) if isinstance(b, Head) else (b.ug, b.ua) for layout, b in blocks.items()}
        self.stacks = Stacks(sides)
        self.shifts.forget()
        self.signal.forget()

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self):
        return {**super().state(), "spectrum": self.spectrum.state(), "signal": self.signal.state()}

    def load(self, state):
        super().load(state)
        self.sources = set(self.averages.entries)
        if self.of_gradients is not None:
            self.of_gradients.recall(self.averages)
        if self.blocks:
            self.spectrum.d = torch.cat([block.d.reshape(-1) for block in self.blocks.values()])
            self.spectrum.load(state.get("spectrum", {}))
            self._share(self.blocks)
        if "signal" in state:
            self.signal.load(state["signal"])

    # -- stepping ------------------------------------------------------------------------------------------------------

    def precondition(self, gradient, seen, schedule):
        if not self.spectrum.reads_rows:
            self._adopt()
        self._average(gradient, seen, schedule)
        self._refresh(schedule)
        for chunk in self.held:
            self._square(chunk)
        if self.spectrum.reads_rows:
            self.squares = seen.joined(self.squares)
        if self.blocks:
            packed = self.packed(gradient)
            tails = self.shifts.tails(self.blocks, schedule.damping, self.manner.power)
            parts = self._down(packed, tails)
            v = self.spectrum.follow(self.coordinates, seen, schedule.scalings_decay, self._squares(seen))
            w = self.spectrum.divided(v, self.shifts.of(self.blocks, self.spectrum.d, schedule.damping))
            if schedule.variance is not None:
                self.signal.follow(v * seen.mean, self.spectrum.d, seen.examples, schedule.variance.decay)
                w = w * self.signal.share(schedule.variance.least)
            self.coordinates.copy_(w)
            self._up(packed, parts, tails)
            packed.write()
        self.forget()

    def _down(self, packed: Packed, tails: dict[Layout, Tail]) -> dict[Layout, Parts]:
        """The gradient in the bases, into ``coordinates``; of leading parts, what :meth:`Head.up` takes too."""
        parts, singly = {}, not self.rank.rows
        self.stacks.product(packed.blocks, self.places, singly=singly)
        others = self.stacks.others(self.blocks.items(), packed.blocks, self.places, singly=singly)
        for (layout, block), x, y in others:
            if isinstance(block, Head):
                parts[layout] = block.down(x, self.rank.of(layout, x, block.costs), tails[layout][1])
                y.copy_(parts[layout].inside)
            else:
                y.copy_(self.rank.product(layout, block.ug, x, block.ua))
        return parts

    def _up(self, packed: Packed, parts: dict[Layout, Parts], tails: dict[Layout, Tail]) -> None:
        """The way back, of what was divided in the bases and lies in ``coordinates``."""
        self.stacks.back(self.places, packed.blocks, singly=True)
        others = self.stacks.others(self.blocks.items(), packed.blocks, self.places, singly=True)
        for (layout, block), x, y in others:
            if isinstance(block, Head):
                block.up(parts[layout], y, tails[layout][0], x)
            else:
                x.copy_(block.basis.mv(y))

    def _average(self, gradient: Tensor, seen: Seen, schedule: Schedule) -> None:
        """Factors take in what was observed, or the gradient."""
        if self.of_gradients is None:
            if self.pending.sums:
                self.averages.take(self.pending, seen.examples, seen.scale, schedule.decay)
        elif self.of_gradients.dense and (schedule.statistics or not self.blocks):
            self.of_gradients.take(self.averages, gradient, seen, schedule.decay)

    def _squares(self, seen: Seen) -> Tensor | None:
        """Mean squares of the examples along the eigenvectors; of blocks that were not seen, what is held of them."""
        if not self.squares.sums:
            return None
        flat = self.spectrum.d.clone()
        places = dict(zip(self.blocks, views(flat, self.blocks)))
        for layout, t in scaled_means(self.squares, max(seen.examples, 1), seen.scale).items():
            places[layout].copy_(t["d"])
        return flat
