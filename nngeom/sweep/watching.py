"""A block of the user's in which a model trains: its passes are watched, and what was seen is complete at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nngeom.core.errors import ArgumentError
from nngeom.sweep.follow import Follower
from nngeom.sweep.observe import Observation, Observer


class Watching:
    """Within: the calls of a model, and the backward passes through them, are watched for an observation that is
    complete on leaving. Nothing is left on the model.

    ``before`` is run before every call; ``record=False`` counts examples only; ``positions``: count those of the
    outputs that have a gradient.
    """

    def __init__(self, observer: Observer, before: Callable[[], None], *, record: bool = True, positions: bool = False):
        self.observer, self.observation = observer, Observation()
        self.follower = Follower(observer, lambda: record, lambda: positions, before, lambda: None, block=True)

    def __enter__(self) -> Observation:
        if self.observer.watching is not None:
            raise ArgumentError(
                "observe() was entered inside another observe() of the same optimizer; leave the first one before"
            )
        self.observer.watching = self.follower.forget
        try:
            self.handles = self.follower.install(self.follower.enter, self.follower.leave)
        except BaseException:
            self.observer.watching = None
            raise
        return self.observation

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None:
                self._require_passes()
                self.follower.take(self.observation)
        finally:
            self.observer.watching = None
            self.follower.uninstall(self.handles)

    def _require_passes(self) -> None:
        if not self.follower.called:
            raise ArgumentError(
                "the model was not called inside observe(), or not with gradients; expected its forward and backward "
                "pass there. One that torch.compile made is given to the optimizer itself: model = "
                "torch.compile(model) before EKFAC(model)"
            )
        if not self.follower.arrived:
            raise ArgumentError(
                "no backward pass through the model happened inside observe(); expected loss.backward() before leaving "
                "it"
            )
