"""What was observed since the last step."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any


class SkippedStepWarning(UserWarning):
    """A step was not taken because gradients or statistics were not finite; parameters and state are as before."""


@dataclass(frozen=True)
class Seen:
    """What was seen since the last step: how many ``examples``; by what the observed gradients are to be multiplied to
    be those of single examples' losses, ``scale``, and ``.grad`` to be that of their mean, ``mean``.
    """

    examples: int
    scale: float
    mean: float


@dataclass
class Pending:
    """Counts of an optimizer in an object of its own.

    Wrappers of an optimizer (Lightning's) run its methods on themselves: what these change in an object reaches the
    optimizer, what they assign does not.
    """

    reduction: str
    examples: int = 0
    loss_scale: float = 1.0
    skipped: int = 0  # steps so far

    def forget(self) -> None:
        """A step was taken, or left out."""
        self.examples, self.loss_scale = 0, 1.0

    def skip(self, why: str) -> None:
        """Count a step that is not taken, with a :class:`SkippedStepWarning`."""
        self.skipped += 1
        warnings.warn(f"a step was skipped ({self.skipped} so far): {why}", SkippedStepWarning, stacklevel=5)

    def take(self, examples: int, scaler: Any) -> None:
        """More examples, their losses scaled by a ``GradScaler`` where one is given."""
        if scaler is not None:
            self.loss_scale = scaler.get_scale()
        self.examples += examples

    def seen(self, *, own_loss: bool) -> Seen:
        """For rows of the user's ``own_loss``, which carry its reduction and scale, or for those of a metric."""
        mean = self.reduction == "mean"
        scale = (self.examples if mean else 1) / self.loss_scale if own_loss else 1.0
        return Seen(self.examples, scale, 1.0 if mean or not self.examples else 1 / self.examples)

    def state(self) -> dict[str, Any]:
        """What outlives a step."""
        return {"skipped": self.skipped, "reduction": self.reduction}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.skipped, self.reduction = state["skipped"], state["reduction"]
