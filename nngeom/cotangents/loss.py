"""Losses of the outputs as measures need them: cotangents of empirical Fisher, Gauss-Newton and kernel matrices."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.network import require_targets
from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.output_metric import OutputMetric
from nngeom.cotangents.causal import by_name
from nngeom.cotangents.cross_entropy import CrossEntropy
from nngeom.cotangents.likelihood import diagonal_columns
from nngeom.cotangents.of_torch import known
from nngeom.cotangents.per_example import CallableLoss
from nngeom.cotangents.per_example import Loss as Loss
from nngeom.cotangents.separable import BinaryCrossEntropy, PoissonLoss, SquaredError
from nngeom.sweep.columns import Columns

_NAMES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
    "mse": SquaredError,
    "bce": BinaryCrossEntropy,
    "poisson": PoissonLoss,
}


def as_loss(loss: Any, model: nn.Module | None = None) -> Loss:
    """A loss by name, instance, module of torch or function of (outputs, targets) with one number an example.

    ``model``: whose outputs it judges; ``"cross_entropy"`` of a causal language model shifts its labels
    (:class:`CausalLM`). Raises :class:`ArgumentError` or :class:`ArgumentTypeError` for anything else.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str) and loss in _NAMES:
        return by_name(_NAMES[loss](), model)
    if isinstance(loss, type) and issubclass(loss, Loss):
        return loss()
    expected = (
        f"expected {', '.join(map(repr, _NAMES))}, a Loss, a loss module of torch, "
        "or a function (outputs, targets) -> (n,)"
    )
    if isinstance(loss, str):
        raise ArgumentError(f"loss is {loss!r}; {expected}")
    of_torch = known(loss)
    if of_torch is not None:
        return of_torch
    if callable(loss) and not isinstance(loss, type):
        _require_two_arguments(loss, expected)
        return CallableLoss(loss)
    raise ArgumentTypeError(f"loss is {loss.__name__ if isinstance(loss, type) else type(loss).__name__}; {expected}")


def _require_two_arguments(loss: Callable[..., Any], expected: str) -> None:
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):  # of compiled code, which does not tell
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise ArgumentTypeError(
            f"the loss {name}{signature} cannot be called with (outputs, targets): {error}; {expected}"
        ) from None


def judged(loss: Loss, outputs: Tensor, batch: Any) -> tuple[Loss, Any]:
    """What a loss is for the outputs of a batch, and the targets; raises :class:`LoaderError` where there are none."""
    require_targets(batch)
    loss = loss.resolved(outputs, batch)
    return loss, loss.targets_of(outputs, batch)


@dataclass(frozen=True)
class EmpiricalFisher:
    """Second moment of per-example loss gradients, with the targets of the batch."""

    loss: Loss

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """The gradient of the loss in the outputs."""
        loss, y = judged(self.loss, outputs, batch)
        g = loss.gradient(outputs, y)
        return Columns(1, lambda lo, hi: g.unsqueeze(0))


@dataclass(frozen=True)
class GaussNewton:
    """``J^T (d2 loss / d outputs2) J``."""

    loss: Loss

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """The square root of the Hessian of the loss in the outputs."""
        loss, y = judged(self.loss, outputs, batch)
        return loss.square_root(outputs, y)

    def metric(self, outputs: Tensor, batch: Any) -> OutputMetric | None:
        """The Hessian of the loss without its root, along the last axis of the outputs, where it is known."""
        loss, y = judged(self.loss, outputs, batch)
        return loss.metric(outputs, y)

    def times(self, outputs: Tensor, tangent: Tensor, batch: Any, start: int) -> Tensor:
        """The Hessian of the loss in the outputs times a tangent."""
        loss, y = judged(self.loss, outputs, batch)
        return loss.times(outputs, tangent, y)

    def root_times(self, outputs: Tensor, noise: Callable[..., Tensor], batch: Any) -> Tensor:
        """The square root of the Hessian of the loss in the outputs times noise ``(k, n, *shape)``."""
        loss, y = judged(self.loss, outputs, batch)
        return loss.root_times(outputs, noise, y)


@dataclass(frozen=True)
class EveryOutput:
    """Every output by itself: the rows of the Jacobian."""

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """UseGroup cotangents, output by output."""
        return diagonal_columns(torch.ones_like(outputs))
