"""A block of the user's passes, taken in at its end by the optimizer that they are observed for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn

from nngeom.capture.kept_whole import kept_whole
from nngeom.optim.arguments import as_reduction
from nngeom.optim.intake import Intake
from nngeom.optim.replicas import require_team_now
from nngeom.sweep.observe import Observation, Observer
from nngeom.sweep.watching import Watching


class Observing:
    """Within: passes are watched by an ``observer``; at the end an ``intake`` takes them.

    ``reduction``, ``scaler``: as for :meth:`NaturalGradient.observe`; ``sharded``: the model is under ``fully_shard``.
    """

    def __init__(self, observer: Observer, intake: Intake, reduction: str | None, scaler: Any, *, sharded: bool):
        self.observer, self.intake, self.sharded = observer, intake, sharded
        self.reduction, self.scaler = reduction, scaler

    def __enter__(self) -> Observation:
        observer, intake = self.observer, self.intake
        if self.reduction is not None:
            intake.pending.say(as_reduction(self.reduction))
        rows, positions = intake.wants_rows(), intake.wants_positions()
        self.watched: AbstractContextManager[Observation]
        self.watched = Watching(observer, partial(require_team_now, observer.team), record=rows, positions=positions)
        if self.sharded:
            self.watched = _kept_whole(observer.network.model, self.watched)
        self.observation = self.watched.__enter__()
        return self.observation

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.watched.__exit__(kind, error, traceback)
        if kind is None:
            self.intake.take(self.observation, self.scaler)


@contextlib.contextmanager
def _kept_whole(model: nn.Module, watched: AbstractContextManager[Observation]) -> Iterator[Observation]:
    with kept_whole(model), watched as observation:
        yield observation
