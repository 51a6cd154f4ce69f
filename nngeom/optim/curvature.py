"""What an optimizer keeps of the curvature of some parameters: statistics in, preconditioned gradients out."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.damping import Cutoff, Damping, FactoredTikhonov
from nngeom.core.errors import SingularError
from nngeom.core.layout import Layout
from nngeom.core.statistic import Sums
from nngeom.generator.sweep import Chunk
from nngeom.optim.averages import Averages, all_finite, plain_blocks, restored_blocks, scaled_means
from nngeom.pmat.block import Block
from nngeom.pmat.ekfac import scaling_statistic
from nngeom.pmat.kfac import EigenBlock, kronecker_blocks
from nngeom.pmat.pmat import Representation
from nngeom.pmat.recipe import Scope


@dataclass(frozen=True)
class Schedule:
    """What is due at one step, and the numbers in force at it."""

    statistics: bool  # averages take in this batch
    refresh: bool  # inverses or eigenbases are computed anew
    decay: float  # weight of the past in the averages
    scalings_decay: float
    damping: Damping


@dataclass(frozen=True)
class Seen:
    """What was seen since the last step: examples, and by what the observed gradients are to be multiplied."""

    examples: int
    scale: float
    gradient: Tensor  # [d], as it stands in .grad
    mean: float  # what makes it that of the mean loss


class Curvature(ABC):
    """One part of the parameters."""

    def __init__(self, representation: Representation, scope: Scope):
        self.representation, self.scope = representation, scope
        self.averages = Averages()
        self.blocks: dict[Layout, Any] = {}
        self.forget()

    def forget(self) -> None:
        """Drop what was observed since the last step."""
        self.pending = Sums()

    def finite(self) -> bool:
        """Whether what was observed is free of NaN and infinity."""
        return all_finite(self.pending)

    @abstractmethod
    def observe(self, chunk: Chunk, schedule: Schedule) -> None:
        """Take in the rows of some examples, gradients as they were backpropagated."""

    @abstractmethod
    def update(self, seen: Seen, schedule: Schedule) -> None:
        """Bring averages, inverses and bases up to date for a step."""

    @abstractmethod
    def precondition(self, flat: Tensor, out: Tensor, damping: Damping) -> None:
        """Write the preconditioned gradient of these parameters from ``flat [d]`` into ``out [d]``."""

    def state(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {"names": list(self.scope.names), "averages": self.averages.plain(), "blocks": plain_blocks(self.blocks)}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.averages, self.blocks = Averages.restored(state["averages"]), restored_blocks(state["blocks"])


class Averaged(Curvature):
    """Any representation of one sweep: averages of its statistics, and the inverse of its blocks, kept between refreshes.

    ``blocks`` are the inverses. ``eager``: they follow every new statistic, whatever the schedule.
    """

    def __init__(self, representation: Representation, scope: Scope, eager: bool = False):
        super().__init__(representation, scope)
        self.eager = eager
        self.statistic = next(representation.recipe(scope))

    def observe(self, chunk, schedule):
        if schedule.statistics:
            self.pending.add(self.statistic(self.scope.restrict(chunk)), chunk.examples if chunk.first else 0)

    def update(self, seen, schedule):
        fresh = bool(self.pending.sums)
        if fresh:
            self.averages.update(scaled_means(self.pending, seen.examples, seen.scale), schedule.decay)
        self.forget()
        if self.averages.entries and (schedule.refresh or (self.eager and fresh) or not self.blocks):
            recipe = self.representation.recipe(self.scope)
            next(recipe)
            try:
                recipe.send(self.averages.read())
            except StopIteration as end:
                self.blocks = {layout: inverse(block, schedule.damping) for layout, block in end.value.items()}

    def precondition(self, flat, out, damping):
        for layout, inverse in self.blocks.items():
            layout.scatter_(out, inverse.mv(layout.gather(flat)))


class Eigenbasis(Curvature):
    """EKFAC: eigenbases of averaged Kronecker factors, and second moments along them that follow every step.

    ``scalings="batch"``: of the batch's examples (George et al. 2018, Algorithm 1). ``"running"``: EKFAC-ra,
    ``s <- decay s + (1 - decay) n v^2`` with ``v`` the gradient of the mean loss in the basis, ``s`` starting from the
    factors' eigenvalues at every refresh; under a metric whose rows are not the loss's, the batch's second moments take
    the place of ``n v^2``. Second moments taken in different bases are never averaged.
    """

    def __init__(self, representation: Representation, scope: Scope, scalings: str, own_rows: bool, worker: ThreadPoolExecutor | None):
        super().__init__(representation, scope)
        self.statistic: Callable = next(representation.recipe(scope))
        self.running, self.from_gradient, self.worker = scalings == "running", scalings == "running" and not own_rows, worker
        self.sources: set[Layout] = set()  # layers that have a basis
        self.future: Future | None = None
        self._coordinates: dict[Layout, Tensor] = {}  # of this step's gradient
        self._shifts: dict[Layout, tuple[Damping, Tensor | float]] = {}  # the damping of each coordinate, while basis and damping stay

    def forget(self):
        super().forget()
        self.squares = Sums()
        self.held: list[Chunk] = []

    def finite(self):
        return super().finite() and all_finite(self.squares)

    def observe(self, chunk, schedule):
        if not self.from_gradient and not self.squares.sums:
            self._adopt()
        chunk = self.scope.restrict(chunk)
        if schedule.statistics:
            self.pending.add(self.statistic(chunk), chunk.examples if chunk.first else 0)
        if self.from_gradient:
            return
        if self._waits_for_basis(schedule):
            self.held.append(chunk)
        else:
            self._square(chunk)

    def _waits_for_basis(self, schedule: Schedule) -> bool:
        return not self.blocks or (schedule.refresh and self.worker is None)

    def _square(self, chunk: Chunk) -> None:
        known = {lay: j for lay, j in chunk.jacobians.items() if lay in self.sources}
        self.squares.add(scaling_statistic(self.blocks)(dataclasses.replace(chunk, jacobians=known)), chunk.examples if chunk.first else 0)

    def update(self, seen, schedule):
        if self.from_gradient:
            self._adopt()
        if self.pending.sums:
            self.averages.update(scaled_means(self.pending, seen.examples, seen.scale), schedule.decay)
        self._refresh(schedule)
        for chunk in self.held:
            self._square(chunk)
        past = schedule.scalings_decay if self.running else 0.0
        if self.from_gradient:
            for layout, block in self.blocks.items():
                v = self._coordinates[layout] = block.basis.tmv(layout.gather(seen.gradient))
                self._follow(layout, (seen.examples * seen.mean**2) * v.square(), past)
        else:
            for layout, t in scaled_means(self.squares, max(seen.examples, 1), seen.scale).items():
                self._follow(layout, t["d"], past)
        self.forget()

    def _follow(self, layout: Layout, d: Tensor, past: float) -> None:
        block = self.blocks[layout]
        self.blocks[layout] = dataclasses.replace(block, d=torch.lerp(d, block.d, past) if past else d.to(block.d.dtype))

    def _refresh(self, schedule: Schedule) -> None:
        fresh = self.averages.entries.keys() - self.sources
        if not self.averages.entries or not (schedule.refresh or fresh):
            return
        if self.worker is None or fresh:
            self.blocks, self.sources = eigenbases(self.averages.read()), set(self.averages.entries)
            self._shifts.clear()
        elif self.future is None:
            self.future = self.worker.submit(eigenbases, self.averages.read())

    def _adopt(self) -> None:
        """Take over bases that a background thread has finished, before anything is projected on them."""
        if self.future is not None and self.future.done():
            self.blocks, self.future = self.future.result(), None
            self._shifts.clear()

    def load(self, state):
        super().load(state)
        self.sources = set(self.averages.entries)

    def precondition(self, flat, out, damping):
        for layout, block in self.blocks.items():
            v = self._coordinates.pop(layout, None)
            v = block.basis.tmv(layout.gather(flat)) if v is None else v
            layout.scatter_(out, block.basis.mv(v * self._reciprocals(layout, block, damping)))

    def _reciprocals(self, layout: Layout, block: EigenBlock, damping: Damping) -> Tensor:
        """``1 / (d + damping)``; where damping is positive the sum needs no check, and its constant part is kept."""
        if isinstance(damping, Cutoff) or damping.value == 0:
            return block.inverse(damping).d
        kept = self._shifts.get(layout)
        if kept is None or kept[0] != damping:
            shift = block.additive(damping.value) if isinstance(damping, FactoredTikhonov) else damping.value
            kept = self._shifts[layout] = (damping, shift)
        return (block.d + kept[1]).reciprocal_()


def inverse(block: Block, damping: Damping) -> Block:
    """``(block + damping)^-1``, in float64 where float32 finds it singular."""
    try:
        return block.inverse(damping)
    except SingularError:
        if block.diag().dtype != torch.float32:
            raise
        return block.to(torch.float64).inverse(damping).to(torch.float32)


def eigenbases(means: dict[Layout, dict[str, Tensor]]) -> dict[Layout, EigenBlock]:
    """The eigenbases of Kronecker factors, with the spectrum of their product."""
    return {layout: block.eigen() for layout, block in kronecker_blocks(means).items()}
