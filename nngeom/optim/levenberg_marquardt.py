"""Damping that follows how well the quadratic model predicts the loss (Levenberg-Marquardt; Martens & Grosse 2015,
6.5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nngeom.core.damping import Damping, FactoredTikhonov, Tikhonov
from nngeom.core.errors import ArgumentError
from nngeom.core.given_plainly import require_real


@dataclass
class LevenbergMarquardt:
    """``ratio = (L(w + step) - L(w)) / (predicted change)`` on the batch: above 3/4 the damping falls, below 1/4 it
    grows.

    From ``initial`` on, every ``every`` steps the damping is multiplied by ``decay**every`` or divided by it, within
    ``[least, most]``. ``factored`` says whether it damps the factors (:class:`FactoredTikhonov`, not balanced) or the
    matrix. The optimizer's step needs the loss of the batch as a function, ``opt.step(evaluate=lambda:
    criterion(model(x), y))``; it is called twice every ``every`` steps, without gradients.
    """

    initial: float = 1e-2
    every: int = 5
    decay: float = 0.95
    least: float = 1e-8
    most: float = 1e3
    factored: bool = True

    def __post_init__(self):
        for name in ("initial", "decay", "least", "most"):
            require_real(getattr(self, name), name)
        if not self.initial > 0:
            raise ArgumentError(f"initial is {self.initial}; expected a positive finite damping")
        if not (isinstance(self.every, int) and self.every >= 1 and 0 < self.decay < 1):
            raise ArgumentError(
                f"every={self.every}, decay={self.decay}; expected a whole number >= 1 and a number in (0, 1)"
            )
        self.value = float(self.initial)

    def damping(self) -> Damping:
        """The damping in force."""
        return FactoredTikhonov(self.value, balanced=False) if self.factored else Tikhonov(self.value)

    def due(self, step: int) -> bool:
        """Whether this ``step``, counted from 0, is compared with its prediction."""
        return (step + 1) % self.every == 0

    def update(self, change: float, predicted: float) -> float:
        """Adapt to a ``change`` of the loss and the (negative) change that was ``predicted``; returns the reduction
        ratio.
        """
        ratio = change / predicted if predicted < 0 and math.isfinite(change) else -math.inf
        if ratio > 0.75:
            self.value *= self.decay**self.every
        elif ratio < 0.25:
            self.value /= self.decay**self.every
        self.value = min(max(self.value, self.least), self.most)
        return ratio
