"""Passes that nobody wrapped in ``observe()``: seen by the optimizer itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import finalize

import torch
from torch import Tensor

from nngeom.capture.kept_whole import kept_whole
from nngeom.core.errors import ArgumentError
from nngeom.optim.replicas import require_team_now
from nngeom.sweep.around import remove
from nngeom.sweep.follow import Follower
from nngeom.sweep.observe import Observation, Observer
from nngeom.sweep.weakly import weakly


class Intake(Protocol):
    """Where observations go."""

    @property
    def examples(self) -> int:
        """How many since the last step."""

    def wants_rows(self) -> bool:
        """Whether rows are wanted now, or numbers of examples only."""

    def wants_positions(self) -> bool:
        """Whether positions of the outputs are counted."""

    def take(self, observation: Observation, scaler: Any = None) -> None:
        """One more observation, its losses multiplied by a ``scaler`` where one is given."""

    def forget(self) -> None:
        """Drop what was observed since the last step."""


class Automatic:
    """Follows a model's calls for an optimizer: always where it is ``on``, else while a closure runs.

    Calls are taken in when the next one begins, or the step; until then ``zero_grad`` drops them.
    """

    def __init__(self, observer: Observer, intake: Intake, parameters: Sequence[Tensor], *, on: bool):
        self.on, self.intake, self.parameters = on, intake, parameters
        wanted = intake.wants_rows, intake.wants_positions
        self.follower = Follower(observer, *wanted, self._before, self._drop_what_was_dropped, training=on)
        if on:
            handles = self.follower.install(Hook(self.follower.enter), Hook(self.follower.leave))
            finalize(self.follower, remove, handles).atexit = False

    def _before(self) -> None:
        require_team_now(self.follower.observer.team)
        self.collect()

    def _drop_what_was_dropped(self) -> None:
        """What was observed does not count where its gradients are gone, as by ``model.zero_grad()``."""
        if (self.follower.arrived or self.intake.examples) and all(p.grad is None for p in self.parameters):
            self.forget()

    def collect(self) -> None:
        """Take in what has arrived."""
        self._drop_what_was_dropped()
        if self.follower.arrived:
            self.intake.take(self.follower.take(Observation()))

    def forget(self) -> None:
        """Drop what was observed since the last step, in a block that is still open too."""
        for forget in (self.follower.forget, self.intake.forget, self.follower.observer.watching):
            if forget is not None:
                forget()

    def run(self, closure: Callable[[], Any]) -> Any:
        """What the ``closure`` returns, its passes followed."""
        model, installed = self.follower.observer.network.model, self.follower.installed
        with torch.enable_grad(), kept_whole(model), contextlib.nullcontext() if self.on else installed():
            loss = closure()
            self.collect()
        return loss

    def is_idle(self) -> bool:
        """Whether there is nothing to step on; raises :class:`ArgumentError` where there is and no pass was seen."""
        if self.intake.examples:
            return False
        if all(p.grad is None for p in self.parameters):
            return True
        raise ArgumentError(
            "gradients are there, and no pass of the model that they come from was seen since the last step: expected "
            "the model that the optimizer was given, called as a whole, with gradients and in training mode "
            "(model.train()). One that torch.compile made is given to the optimizer itself: model = "
            "torch.compile(model) before EKFAC(model, automatic=True)"
        )


class Hook:
    """A method of what may go away, on a model: copies of the model, by pickle too, have one that does nothing."""

    def __init__(self, method: Callable[..., None]):
        self.method = weakly(method)

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self.method(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()


def _inert() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    pass
