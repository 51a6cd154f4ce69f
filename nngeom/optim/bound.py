"""The bound on a step: the divergence that the quadratic model predicts for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nngeom.optim.arguments import number
from nngeom.optim.gradients import Gradients


@dataclass
class Bound:
    """What is known of the directions ``v`` of a step before it is taken.

    ``divergence``: ``1/2 sum lr^2 v^T (F + damping) v`` over the groups; ``squared``: ``v^T (F + damping) v`` of all;
    ``lr`` and ``momentum``: the largest of the groups; ``clipped``: whether the bound made the step shorter.
    """

    divergence: float = 0.0
    squared: float = 0.0
    lr: float = 0.0
    momentum: float = 0.0
    clipped: bool = False

    def measure(self, groups: list[dict[str, Any]], step: int, gradients: Gradients) -> None:
        """Of the directions in ``gradients.flat`` of parameters whose ``.grad`` still is the gradient ``(F + damping)
        v``; not finite where a direction is not.
        """
        self.divergence = self.squared = self.lr = self.momentum = 0.0
        for group in groups:
            lr, momentum = number("lr", group["lr"], step), number("momentum", group["momentum"], step)
            self.lr, self.momentum = max(self.lr, lr), max(self.momentum, momentum)
            squared = gradients.dot(group["params"])
            self.squared += squared
            self.divergence += 0.5 * lr**2 * squared

    def factor(self, kl_clip: float | None) -> float:
        """What brings the divergence to ``kl_clip`` at most."""
        clip = 1.0 if kl_clip is None or self.divergence <= kl_clip else math.sqrt(kl_clip / self.divergence)
        self.squared *= clip**2
        self.clipped = clip < 1
        return clip
