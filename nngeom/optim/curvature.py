"""What an optimizer keeps of the curvature of some parameters: statistics in, preconditioned gradients out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.damping import Damping
from nngeom.core.errors import SingularError
from nngeom.core.layout import Layout
from nngeom.core.statistic import Sums
from nngeom.generator.sweep import Chunk
from nngeom.optim.averages import Averages, all_finite, plain_blocks, restored_blocks, scaled_means
from nngeom.optim.packed import Packed
from nngeom.optim.schedule import Schedule
from nngeom.pmat.block import Block
from nngeom.pmat.pmat import Representation
from nngeom.pmat.recipe import Scope


@dataclass(frozen=True)
class Seen:
    """What was seen since the last step: examples, and by what the observed gradients are to be multiplied."""

    examples: int
    scale: float
    mean: float  # what makes .grad that of the mean loss


class Curvature(ABC):
    """One part of the parameters."""

    def __init__(self, representation: Representation, scope: Scope):
        self.representation, self.scope = representation, scope
        self.averages = Averages()
        self.blocks: dict[Layout, Any] = {}
        self._packed: Packed | None = None
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
    def precondition(self, gradient: Tensor, seen: Seen, schedule: Schedule) -> None:
        """Bring averages, inverses and bases up to date, and precondition these parameters' part of ``gradient [d]`` in place."""

    def packed(self, vector: Tensor) -> Packed:
        """Room for the blocks of these parameters, filled from the vector."""
        if self._packed is None or self._packed.vector is not vector or self._packed.layouts != tuple(self.blocks):
            self._packed = Packed(self.blocks, vector)
        self._packed.read()
        return self._packed

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
            self.pending.add(self.statistic, self.scope.restrict(chunk))

    def precondition(self, gradient, seen, schedule):
        fresh = bool(self.pending.sums)
        if fresh:
            self.averages.update(scaled_means(self.pending, seen.examples, seen.scale), schedule.decay)
        self.forget()
        if self.averages.entries and (schedule.refresh or (self.eager and fresh) or not self.blocks):
            self._refresh(schedule.damping)
        if self.blocks:
            packed = self.packed(gradient)
            for x, inverse in zip(packed.blocks, self.blocks.values()):
                x.copy_(inverse.mv(x))
            packed.write()

    def _refresh(self, damping: Damping) -> None:
        recipe = self.representation.recipe(self.scope)
        next(recipe)
        try:
            recipe.send(self.averages.read())
        except StopIteration as end:
            self.blocks = {layout: inverse(block, damping) for layout, block in end.value.items()}


def inverse(block: Block, damping: Damping) -> Block:
    """``(block + damping)^-1``, in float64 where float32 finds it singular."""
    try:
        return block.inverse(damping)
    except SingularError:
        if block.diag().dtype != torch.float32:
            raise
        return block.to(torch.float64).inverse(damping).to(torch.float32)
