"""Whether steps do to the loss what the quadratic model says, from the gradients that training computes anyway."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.optim.bound import Bound

EVERY, FIRST, LEAST, MAGNITUDE, DECAY = 5, 20, 3, 10.0, 0.75


class QuadraticModelWarning(UserWarning):
    """The quadratic model of the loss is wrong by an order of magnitude along the optimizer's steps."""


@dataclass
class ModelCheck:
    """The slope of the loss along a step ``d``, as the next gradient ``g'`` sees it, against the model's.

    The model's curvature along a step is ``d^T (F + damping) d <= (lr r)^2`` with ``r <- momentum r + sqrt(v^T (F +
    damping) v)`` for the directions ``v``; the loss's is ``g'^T d - g^T d``, of which ``g'^T d`` alone is free of the
    bias that ``d`` is made of ``g``. Over the means of several steps, the first :data:`FIRST` and one in :data:`EVERY`
    later, it warns once where the loss rises (``g'^T d`` is above its sampling error and a tenth of the slope that the
    step went down) with :data:`MAGNITUDE` times the model's curvature. Of steps that were bounded, ``g'^T d`` must be
    as much by itself, and more than the slope, for the bound answers for the rest.
    """

    steps: int = 0
    norm: float = 0.0  # r
    after: float = 0.0  # running means over the steps that were looked at: of g'^T d,
    curvature: float = 0.0  # of the model's curvature,
    slope: float = 0.0  # of the slope down which the step went,
    bounded: float = 0.0  # and of whether it was bounded
    seen: int = 0
    risen: int = 0  # comparisons running in which the loss rose
    warned: bool = False
    step: Tensor | None = None  # d [d], while the next gradient is waited for

    def arrived(self, gradient: Tensor, examples: int) -> None:
        """The next ``gradient [d]`` of the mean loss over so many ``examples``, as it comes."""
        if self.step is None:
            return
        after, self.step = float(torch.dot(gradient, self.step)), None
        if not math.isfinite(after):
            return
        self.after = DECAY * self.after + (1 - DECAY) * after
        self.seen += 1
        sampling = 4 * math.sqrt(self.curvature / max(1, examples))
        if self.bounded > 0.5:
            wrong = self.after > max(MAGNITUDE * self.curvature, self.slope, sampling)
        else:
            rising = self.after > max(0.1 * self.slope, sampling)
            wrong = rising and self.after + self.slope > MAGNITUDE * self.curvature
        if wrong and self.seen >= LEAST and not self.warned:
            self.warned = True
            self._warn()

    def stepped(self, bound: Bound) -> bool:
        """A step is taken that was measured by ``bound``; whether :attr:`step` is wanted."""
        root = math.sqrt(max(bound.squared, 0.0))
        self.norm = bound.momentum * self.norm + root
        self.steps += 1
        if self.warned or bound.lr == 0 or (self.steps > FIRST and self.steps % EVERY):
            return False
        for name, new in (
            ("curvature", (bound.lr * self.norm) ** 2),
            ("slope", bound.lr * bound.squared),
            ("bounded", float(bound.clipped)),
        ):
            setattr(self, name, DECAY * getattr(self, name) + (1 - DECAY) * new)
        return True

    def compared(self, ratio: float) -> None:
        """The change of the loss of a batch over that predicted, which is one down; warns once where the loss rose
        :data:`LEAST` times running.
        """
        self.risen = self.risen + 1 if ratio < 0 else 0
        if self.risen >= LEAST and not self.warned:
            self.warned = True
            warnings.warn(
                f"the loss of the batch rose along {self.risen} steps that were to lower it in the quadratic model. "
                "Use a larger damping to start from, a bound (kl_clip=), a smaller lr, or with outputs= those of the "
                "whole batch: of few examples the curvature is too small",
                QuadraticModelWarning,
                stacklevel=5,
            )

    def _warn(self) -> None:
        ratio = (self.after + self.slope) / self.curvature if self.curvature > 0 else math.inf
        warnings.warn(
            f"the loss curves about {ratio:.0f} times as much along the steps as the quadratic model says, and rises "
            "where it was to fall. The second moments of gradients are too small for this loss (an empirical Fisher "
            "matrix of small residuals, a loss averaged over positions), too old, or the steps too long for any "
            "quadratic model. Use kl_clip=1e-4 or less, a smaller lr, a larger damping, or fisher='monte_carlo' with "
            "the likelihood of the loss",
            QuadraticModelWarning,
            stacklevel=6,
        )
