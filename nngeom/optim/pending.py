"""What was observed since the last step."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

from nngeom.core.statistic import Sums
from nngeom.sweep.observe import Observation
from nngeom.sweep.sweep import Chunk


class SkippedStepWarning(UserWarning):
    """A step was not taken because the loss, gradients or statistics were not finite; parameters and state are as
    before.

    It says why, once for each kind of cause: the optimizer's ``skipped`` counts.
    """


@dataclass(frozen=True)
class Seen:
    """What was seen since the last step: how many ``examples``; by what the observed gradients are to be multiplied to
    be those of single examples' losses, ``scale``, and ``.grad`` to be that of their mean, ``mean``.

    With a loss averaged over ``t`` positions an example both are such that second moments are ``1 / t`` of the
    examples': those of single positions, where these are independent.
    """

    examples: int
    scale: float
    mean: float

    def joined(self, sums: Sums) -> Sums:
        """The ``sums`` of statistics over the same examples, of all processes that share the step."""
        return sums


@dataclass
class Pending:
    """Counts of an optimizer in an object of its own.

    Wrappers of an optimizer (Lightning's) run its methods on themselves: what these change in an object reaches the
    optimizer, what they assign does not.
    """

    reduction: str
    said: bool = True  # by the user
    scaler: Any = None
    examples: int = 0
    positions: int = 0  # of all examples, where they are counted
    loss_scale: float = 1.0
    skipped: int = 0  # steps so far
    warned: set[str] = field(default_factory=set)  # kinds of causes
    loss: Any = None  # that a closure returned

    def forget(self) -> None:
        """A step was taken, or left out."""
        self.examples, self.positions, self.loss_scale = 0, 0, 1.0

    def say(self, reduction: str) -> None:
        """The user says how losses are reduced."""
        self.reduction, self.said = reduction, True

    def skip(self, kind: str, why: str) -> None:
        """Count a step that is not taken, with a :class:`SkippedStepWarning` of the first of a ``kind``."""
        self.skipped += 1
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(
                f"a step was skipped: {why}. Parameters and state are as before; opt.skipped counts, and further steps "
                "that are skipped for such a reason are not warned about",
                SkippedStepWarning,
                stacklevel=6,
            )

    def take(self, observation: Observation, scaler: Any) -> None:
        """More examples, their losses scaled by a ``GradScaler`` where one is given."""
        scaler = self.scaler if scaler is None else scaler
        if scaler is not None:
            self.loss_scale = scaler.get_scale()
        self.examples += observation.examples
        self.positions += observation.positions

    def seen(self, *, own_loss: bool) -> Seen:
        """For rows of the user's ``own_loss``, which carry its reduction and scale, or for those of a metric."""
        n, positions = self.examples, max(self.positions, 1)
        match self.reduction:
            case "token_mean":
                own, metric, mean = math.sqrt(n * positions), math.sqrt(n / positions), math.sqrt(positions / max(n, 1))
            case "mean":
                own, metric, mean = n, 1.0, 1.0
            case _:
                own, metric, mean = 1.0, 1.0, 1 / max(n, 1)
        return Seen(n, own / self.loss_scale if own_loss else metric, mean)

    def state(self) -> dict[str, Any]:
        """What outlives a step."""
        return {"skipped": self.skipped, "reduction": self.reduction}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.skipped, self.reduction = state["skipped"], state["reduction"]


def copied(chunk: Chunk) -> Chunk:
    """A chunk to be held until the step: what a model or a loader computed may be overwritten before."""
    return replace(chunk, jacobians=copy.deepcopy(chunk.jacobians))
