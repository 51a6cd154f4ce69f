"""Damping of every eigenvector by how well a batch of examples tells its gradient and its curvature.

Along an eigenvector the mean loss falls by ``g c v - h c^2 v^2 / 2`` for a step ``-c v``. Let ``v`` be the gradient of
a batch of ``n`` examples, ``E v = g`` and ``E v^2 = g^2 + s^2 / n`` with the variance ``s^2`` of the examples'
gradients, and ``h`` the curvature. The expectation is largest at

    c = g^2 / (h E v^2) = 1 / (h + x),   x = h (s^2 / n) / g^2,

so the damping is the curvature times noise over signal (Schaul, Zhang & LeCun 2013, for single parameters). Where ``h``
is itself measured, as the mean ``d`` over the batch with relative variance ``rho^2`` between batches, ``E 1 / d`` is
about ``(1 + rho^2) / h``, which is divided off: ``c = (g^2 / E v^2) / (d (1 + rho^2))``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core.damping import Damping, FactoredTikhonov, Tikhonov
from nngeom.core.errors import ArgumentError


@dataclass(frozen=True)
class VarianceDamping:
    """Steps along every eigenvector are shortened by what is noise in them: ``v (1 - N / V) / ((1 + rho^2) (d + x))``.

    ``V`` and ``N`` are running means, with the weight ``decay`` of the past, of the squared gradient ``v^2`` and of its
    variance, estimated from the examples without bias, ``(d - v^2) / (n - 1)``; ``rho^2`` is the relative variance of
    ``d``, the second moment of the examples, between batches. All start anew with every basis. ``value`` is the damping
    ``x`` besides, ``factored`` whether that is of the factors (:class:`FactoredTikhonov`, not balanced), ``least`` the
    least share of a step that is kept. For ``EKFAC(scalings="batch")``; along eigenvectors that are drowned
    the damping is as ever. Source: Schaul, Zhang & LeCun 2013, for eigenvectors in place of parameters.
    """

    value: float = 1e-3
    decay: float = 0.9
    least: float = 0.01
    factored: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value >= 0):
            raise ArgumentError(f"value is {self.value}; expected a finite damping of at least 0")
        if not (0 <= self.decay < 1 and 0 < self.least <= 1):
            raise ArgumentError(
                f"decay={self.decay}, least={self.least}; expected a number in [0, 1) and one in (0, 1]"
            )

    def damping(self) -> Damping:
        """What is added to all coordinates."""
        return FactoredTikhonov(self.value, balanced=False) if self.factored else Tikhonov(self.value)


class Signal:
    """What the batches in one basis have told of every coordinate: running means of ``V``, ``N``, ``d`` and ``d^2``."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """There are new bases."""
        self.weight, self.means = 0.0, torch.zeros(0)

    def follow(self, v: Tensor, d: Tensor, examples: int, decay: float) -> None:
        """Take in the gradient ``v [p]`` of the mean loss over so many ``examples``, and their second moments ``d
        [p]``. A single example has no variance: what is known stays, and where nothing is, :class:`ArgumentError`.
        """
        if examples < 2 and self.weight:
            return
        if examples < 2:
            raise ArgumentError(
                f"VarianceDamping compares the examples of a batch, and this step saw {examples}; expected 2 or more"
            )
        squared = v.square()
        noise = (d - squared).clamp_min_(0) / (examples - 1)
        new = torch.stack([squared, noise, d, d.square()])
        self.means = torch.zeros_like(new) if self.weight == 0 else self.means
        self.means.lerp_(new, 1 - decay)
        self.weight = decay * self.weight + 1 - decay

    def share(self, least: float) -> Tensor:
        """``(1 - N / V) / (1 + rho^2) [p]``, the first at ``least`` that."""
        v, noise, d, squares = self.means / self.weight
        tiny = torch.finfo(v.dtype).tiny
        signal = (1 - noise / v.clamp_min(tiny)).clamp_(least, 1)
        spread = (squares / d.square().clamp_min(tiny)).clamp_min_(1)  # 1 + rho^2
        return torch.where(d > 0, signal / spread, signal)

    def state(self) -> dict[str, Tensor | float]:
        """As plain values and tensors."""
        return {"weight": self.weight, "means": self.means}

    def load(self, state: dict) -> None:
        """The inverse of :meth:`state`."""
        self.weight, self.means = state["weight"], state["means"].clone()
