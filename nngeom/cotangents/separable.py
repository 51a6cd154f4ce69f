"""Losses that are a sum over outputs: squared error, binary cross-entropy, Poisson. Their curvature is diagonal."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, OutputError
from nngeom.core.output_metric import DiagonalMetric, OutputMetric
from nngeom.cotangents import logistic
from nngeom.cotangents.likelihood import diagonal_columns, like
from nngeom.cotangents.per_example import Loss
from nngeom.cotangents.softmax import wide
from nngeom.sweep.columns import Columns


class Separable(Loss):
    """``sum_j l(f_j, y_j)`` over the outputs of an example, from ``l`` and its first two derivatives, entry by entry.

    Targets have as many entries as the outputs: ``(n,)`` does for outputs ``(n, 1)``.
    """

    @abstractmethod
    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """``l``, differentiable twice without cancellation."""

    @abstractmethod
    def derivative(self, f: Tensor, y: Tensor) -> Tensor:
        """``dl / df``, differentiable without cancellation."""

    @abstractmethod
    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        """``d2l / df2``, not negative."""

    def accepted(self, y: Tensor) -> Tensor:
        """The targets, if their numbers are some of this loss; raises :class:`OutputError`."""
        return y

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.value(wide(outputs), self._like(targets, outputs)).flatten(1).sum(1).to(outputs.dtype)

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.derivative(wide(outputs), self._like(targets, outputs)).to(outputs.dtype)

    def slope(self, outputs: Tensor, targets: Any) -> Tensor | None:
        own = type(self).__call__ is not Separable.__call__
        return None if own else self.derivative(wide(outputs), self._like(targets, outputs)).to(outputs.dtype)

    def square_root(self, outputs: Tensor, targets: Any) -> Columns:
        return diagonal_columns(self._curvature(outputs, targets).sqrt().to(outputs.dtype))

    def times(self, outputs: Tensor, tangent: Tensor, targets: Any) -> Tensor:
        return (self._curvature(outputs, targets) * tangent).to(tangent.dtype)

    def metric(self, outputs: Tensor, targets: Any) -> OutputMetric | None:
        if type(self).square_root is not Separable.square_root:
            return None
        return DiagonalMetric(self._curvature(outputs, targets).to(outputs.dtype).flatten(0, -2))

    def root_times(self, outputs: Tensor, noise: Callable[..., Tensor], targets: Any) -> Tensor:
        return (self._curvature(outputs, targets).sqrt() * noise(*outputs.shape[1:])).to(outputs.dtype)

    def _curvature(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.curvature(wide(outputs), self._like(targets, outputs))

    def _like(self, targets: Any, outputs: Tensor) -> Tensor:
        return self.accepted(like(targets, outputs))


@dataclass(frozen=True)
class SquaredError(Separable):
    """``scale * (f - y)**2``; with one half its Gauss-Newton matrix is the Gaussian Fisher."""

    scale: float = 0.5

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return self.scale * (f - y).square()

    def derivative(self, f: Tensor, y: Tensor) -> Tensor:
        return 2 * self.scale * (f - y)

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(f, 2 * self.scale)

    def _curvature(self, outputs: Tensor, targets: Any) -> Tensor:  # the same whatever the targets are
        return torch.full_like(outputs, 2 * self.scale)

    def times(self, outputs: Tensor, tangent: Tensor, targets: Any) -> Tensor:
        return tangent if self.scale == 0.5 else 2 * self.scale * tangent


@dataclass(frozen=True)
class BinaryCrossEntropy(Separable):
    """``-weight (pos_weight y log sigma(f) + (1 - y) log sigma(-f))`` of logits ``f``, labels ``y`` in [0, 1].

    ``weight``, ``pos_weight``: non-negative, a number an output (broadcast to ``shape``), as in
    ``torch.nn.BCEWithLogitsLoss``.
    """

    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "pos_weight"):
            w = getattr(self, name)
            if w is not None and not bool((w >= 0).all()):
                raise ArgumentError(
                    f"{name} has entries that are negative or NaN; expected non-negative numbers, one an output"
                )

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return self._of("weight", f) * logistic.binary_cross_entropy(f, y, self._of("pos_weight", f))

    def derivative(self, f: Tensor, y: Tensor) -> Tensor:
        return self._of("weight", f) * logistic.slope(f, y, self._of("pos_weight", f))

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        return self._of("weight", f) * logistic.curvature(f, y, self._of("pos_weight", f))

    def accepted(self, y: Tensor) -> Tensor:
        if not bool(((y >= 0) & (y <= 1)).all()):
            raise OutputError(f"targets go from {float(y.min())} to {float(y.max())}; binary labels are in [0, 1]")
        return y

    def _of(self, name: str, f: Tensor) -> Tensor | float:
        w = getattr(self, name)
        if w is None:
            return 1.0
        try:
            return w.to(f).expand(f.shape[1:])
        except RuntimeError:
            raise OutputError(
                f"{name} has shape {tuple(w.shape)}; expected one number an output, as broadcasts to "
                f"{tuple(f.shape[1:])} (one an example is not known here)"
            ) from None


@dataclass(frozen=True)
class PoissonLoss(Separable):
    """Minus the log-likelihood of counts ``y``: ``exp(f) - y f`` of log-rates, or with ``log_input=False`` ``f - y
    log(f + eps)`` of rates.

    ``full`` adds Stirling's approximation of ``log y!`` where ``y > 1``, which no derivative sees. As in
    ``torch.nn.PoissonNLLLoss``.
    """

    log_input: bool = True
    full: bool = False
    eps: float = 1e-8

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        loss = f.exp() - y * f if self.log_input else f - y * (f + self.eps).log()
        if not self.full:
            return loss
        many = y.clamp_min(1)
        return loss + torch.where(y > 1, many * many.log() - many + 0.5 * (2 * torch.pi * many).log(), 0)

    def derivative(self, f: Tensor, y: Tensor) -> Tensor:
        return f.exp() - y if self.log_input else 1 - y / (f + self.eps)

    def curvature(self, f: Tensor, y: Tensor) -> Tensor:
        return f.exp() if self.log_input else y / (f + self.eps).square()

    def accepted(self, y: Tensor) -> Tensor:
        if not bool((y >= 0).all()):
            raise OutputError(f"targets have a smallest entry of {float(y.min())}; counts are not negative")
        return y
