"""From observations of passes to what curvature is kept of, and the counts that scale it."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from nngeom.optim.partition import Partition
from nngeom.optim.pending import Pending
from nngeom.optim.schedule import Clock
from nngeom.sweep.observe import Observation


class ReductionWarning(UserWarning):
    """The outputs have positions, and nobody said whether the loss is averaged over them."""


class Intake:
    """Takes observations in for one optimizer; ``own_loss``: rows are those of the user's loss."""

    def __init__(self, clock: Clock, partition: Partition, pending: Pending, *, own_loss: bool):
        self.clock, self.partition, self.pending, self.own_loss = clock, partition, pending, own_loss

    @property
    def examples(self) -> int:
        """How many since the last step."""
        return self.pending.examples

    def wants_rows(self) -> bool:
        """Whether statistics of them are due."""
        return self.partition.wants_every_batch or (self.clock.due() and self.partition.wants_statistics)

    def wants_positions(self) -> bool:
        """Whether the loss is averaged over them."""
        return self.pending.reduction == "token_mean"

    def take(self, observation: Observation, scaler: Any = None) -> None:
        """Hand the rows of an ``observation`` to the curvature, and its counts to what scales them, with the
        ``scaler`` of its loss.
        """
        if observation.several and self.own_loss and not self.pending.said:
            self.pending.said = True
            warnings.warn(
                "the outputs have several positions an example, and the curvature is scaled as if the loss were summed "
                "over them and averaged over examples: for a loss averaged over all positions (F.cross_entropy of all "
                "tokens, the loss of transformers' models) say reduction='token_mean'; else say reduction='mean'",
                ReductionWarning,
                stacklevel=3,
            )
        if observation.chunks:
            schedule = self.clock.now()
            with torch.no_grad():
                for chunk in observation.chunks:
                    self.partition.observe(chunk, schedule)
            observation.chunks.clear()
        self.pending.take(observation, scaler)

    def forget(self) -> None:
        """Drop what was observed since the last step."""
        self.partition.forget()
        self.pending.forget()
