"""Losses of the outputs, one number an example: for empirical Fisher, Gauss-Newton and Hessian matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nngeom.core import linalg
from nngeom.core.errors import ArgumentError, ArgumentTypeError, OutputError, SizeError
from nngeom.generator.sweep import Columns
from nngeom.generator.task import require_targets
from nngeom.metrics.categorical import Categorical
from nngeom.metrics.likelihood import as_columns, columns_times, diagonal_columns

OUTPUT_LIMIT = 4096  # outputs an example whose Hessian in them is formed


class Loss:
    """A per-example loss ``(outputs, targets) -> (n,)``."""

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        raise ArgumentTypeError("a Loss defines __call__(outputs, targets) -> (n,)")

    def square_root(self, outputs: Tensor, targets: Any) -> Columns:
        """Cotangents ``v [k, n, *shape]`` with ``sum_k v v^T`` the Hessian of the loss in the outputs."""
        return _hessian_root(self, outputs, targets)

    def times(self, outputs: Tensor, tangent: Tensor, targets: Any) -> Tensor:
        """The Hessian of the loss in the outputs times ``tangent (n, *shape)``."""
        with torch.enable_grad():
            f = outputs.detach().requires_grad_()
            gradient = torch.autograd.grad(self(f, targets).sum(), f, create_graph=True)[0]
            return torch.autograd.grad(gradient, f, tangent)[0] if gradient.requires_grad else torch.zeros_like(tangent)


    def root_times(self, outputs: Tensor, noise: Callable[..., Tensor], targets: Any) -> Tensor:
        """``L r (k, n, *shape)`` for the square root ``L`` of the Hessian of the loss in the outputs, as in :class:`Likelihood`."""
        return columns_times(self.square_root(outputs, targets), outputs, noise)


class CrossEntropy(Loss):
    """Softmax cross-entropy, summed over positions; axis ``dim`` of the outputs holds the classes.

    Without ``dim`` it is the axis that labels ``(n, *positions)`` lack; where two would do, it must be said.
    ``weight`` (one number a class), ``label_smoothing`` and ``ignore_index`` mean what they mean in
    ``torch.nn.functional.cross_entropy`` with ``reduction="none"``.
    """

    def __init__(self, weight: Tensor | None = None, label_smoothing: float = 0.0, ignore_index: int = -100, dim: int | None = None):
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"label_smoothing is {label_smoothing}; expected a number in [0, 1]")
        self.weight, self.label_smoothing = weight, label_smoothing
        self.categorical = Categorical(dim, ignore_index)

    def _flat(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        categorical = self.categorical.fit(outputs, targets)
        logits = categorical.logits(outputs)
        n, p, c = logits.shape
        if targets.is_floating_point():
            return logits.reshape(n * p, c), categorical.logits(targets.to(outputs)).reshape(n * p, c)
        if targets.numel() != n * p:
            raise OutputError(
                f"targets have shape {tuple(targets.shape)}; outputs {tuple(outputs.shape)} with classes on axis {categorical.dim} "
                f"need one a position, {n * p}"
            )
        if self.weight is not None and self.weight.shape != (c,):
            raise OutputError(
                f"the class weight has {self.weight.numel()} entries; outputs {tuple(outputs.shape)} have {c} classes on axis {categorical.dim}"
            )
        y, ignored = categorical.labels(targets).reshape(n * p), self.categorical.ignore_index
        counted = y[y != ignored]
        if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= c):
            raise OutputError(
                f"targets hold labels from {int(counted.min())} to {int(counted.max())}; expected from 0 to {c - 1}, or ignore_index={ignored}"
            )
        return logits.reshape(n * p, c), y

    def __call__(self, outputs, targets):
        logits, y = self._flat(outputs, targets)
        weight = None if self.weight is None else self.weight.to(outputs)
        each = F.cross_entropy(logits, y, weight, ignore_index=self.categorical.ignore_index, reduction="none", label_smoothing=self.label_smoothing)
        return each.view(outputs.shape[0], -1).sum(1)

    def square_root(self, outputs, targets):
        """The categorical root, times the root of the total weight of each position's (smoothed) label."""
        categorical, totals = self.categorical.fit(outputs, targets), self._totals(outputs, targets)
        columns = as_columns(categorical.square_root(outputs, targets))
        if totals is None:
            return columns
        root = totals.sqrt()
        return Columns(columns.count, lambda lo, hi: columns.make(lo, hi) * root)

    def times(self, outputs, tangent, targets):
        totals = self._totals(outputs, targets)
        product = self.categorical.fit(outputs, targets).fisher_times(outputs, tangent, targets)
        return product if totals is None else product * totals

    def root_times(self, outputs, noise, targets):
        totals = self._totals(outputs, targets)
        product = self.categorical.fit(outputs, targets).root_times(outputs, noise, targets)
        return product if totals is None else product * totals.sqrt()

    def _totals(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """The total weight of each position's (smoothed) label, in the shape of the outputs; ``None`` where it is always one."""
        categorical = self.categorical.fit(outputs, targets)
        categorical.check(outputs, targets)
        logits, y = self._flat(outputs, targets)
        if self.weight is None and not y.is_floating_point():
            return None
        c = logits.shape[-1]
        weight = torch.ones(c, dtype=outputs.dtype, device=outputs.device) if self.weight is None else self.weight.to(outputs)
        label = y @ weight if y.is_floating_point() else weight[y.where(y != categorical.ignore_index, torch.zeros_like(y))]
        smoothed = (1 - self.label_smoothing) * label + self.label_smoothing * weight.mean()
        return categorical.unmove(smoothed.view(outputs.shape[0], -1, 1).expand(-1, -1, c), outputs)


class SquaredError(Loss):
    """``0.5 * (f - y)**2`` summed over outputs, so that its Gauss-Newton matrix is the Gaussian Fisher."""

    def __call__(self, outputs, targets):
        if targets.numel() != outputs.numel():
            raise OutputError(f"targets have shape {tuple(targets.shape)}; expected that of the outputs, {tuple(outputs.shape)}")
        return 0.5 * (outputs - targets.to(outputs).reshape(outputs.shape)).square().flatten(1).sum(1)

    def square_root(self, outputs, targets):
        return diagonal_columns(torch.ones_like(outputs))

    def times(self, outputs, tangent, targets):
        return tangent

    def root_times(self, outputs, noise, targets):
        return noise(*outputs.shape[1:])


@dataclass(frozen=True)
class CallableLoss(Loss):
    """A user's function ``(outputs, targets) -> (n,)``."""

    function: Callable[[Tensor, Any], Tensor]

    def __call__(self, outputs, targets):
        value = self.function(outputs, targets)
        if not isinstance(value, Tensor) or value.shape != outputs.shape[:1]:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise OutputError(f"the loss returned {given}; expected one number an example, ({outputs.shape[0]},): use reduction='none' and sum over outputs")
        return value


def as_loss(loss: Any) -> Loss:
    """A loss by name, instance or function of (outputs, targets) with one number an example."""
    if isinstance(loss, Loss):
        return loss
    if loss == "cross_entropy":
        return CrossEntropy()
    if loss == "mse":
        return SquaredError()
    if isinstance(loss, str):
        raise ArgumentError(f"loss is {loss!r}; expected 'cross_entropy', 'mse', or a function (outputs, targets) -> (n,)")
    if callable(loss):
        return CallableLoss(loss)
    raise ArgumentTypeError(f"loss is {type(loss).__name__}; expected 'cross_entropy', 'mse', or a function (outputs, targets) -> (n,)")


def _hessian_root(loss: Loss, outputs: Tensor, targets: Any) -> Columns:
    """The symmetric root of each example's Hessian in its outputs, by double backward; raises where it is not convex."""
    width = outputs[0].numel()
    if width > OUTPUT_LIMIT:
        raise SizeError(
            f"the outputs have {width} numbers an example; the Gauss-Newton matrix of a function of them takes {width} x {width} an example, the limit "
            f"is {OUTPUT_LIMIT}: use 'cross_entropy', 'mse' or CrossEntropy(...), whose curvature is known, or a Loss with a square_root of its own"
        )
    try:
        h, rounding = _output_hessian(loss, outputs.double(), targets), 1e-8
    except RuntimeError:  # a function with tensors of its own, in the dtype of the outputs
        h, rounding = _output_hessian(loss, outputs, targets).double(), max(1e-8, 10 * torch.finfo(outputs.dtype).eps)
    values, vectors = linalg.eigh((h + h.mT) / 2)
    least, most = values.min(), values.abs().max()
    if bool(least < -rounding * most.clamp_min(1e-300)):
        raise ArgumentError(
            f"the loss is not convex in the outputs (an eigenvalue of its Hessian is {float(least):.3e}); the Gauss-Newton matrix needs a convex loss: "
            "use Hessian"
        )
    root = (vectors * values.clamp_min(0).sqrt().unsqueeze(1)).permute(2, 0, 1).to(outputs)  # [k n c]
    return Columns(root.shape[0], lambda lo, hi: root[lo:hi].reshape(hi - lo, *outputs.shape))


def _output_hessian(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """``[n, c, c]`` over the flattened outputs of every example."""
    with torch.enable_grad():
        f = outputs.detach().requires_grad_()
        gradient = torch.autograd.grad(loss(f, targets).sum(), f, create_graph=True)[0].flatten(1)
        if not gradient.requires_grad:
            return torch.zeros(len(f), gradient.shape[1], gradient.shape[1], dtype=f.dtype, device=f.device)
        rows = [torch.autograd.grad(gradient[:, j].sum(), f, retain_graph=True)[0].flatten(1) for j in range(gradient.shape[1])]
    return torch.stack(rows, 1)


@dataclass(frozen=True)
class EmpiricalFisher:
    """Second moment of per-example loss gradients, with the targets of the batch."""

    loss: Loss

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """The gradient of the loss in the outputs."""
        y = require_targets(batch)
        with torch.enable_grad():
            f = outputs.detach().requires_grad_()
            g = torch.autograd.grad(self.loss(f, y).sum(), f)[0]
        return Columns(1, lambda lo, hi: g.unsqueeze(0))


@dataclass(frozen=True)
class GaussNewton:
    """``J^T (d2 loss / d outputs2) J``."""

    loss: Loss

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """The square root of the Hessian of the loss in the outputs."""
        return self.loss.square_root(outputs, require_targets(batch))

    def times(self, outputs: Tensor, tangent: Tensor, batch: Any, start: int) -> Tensor:
        """The Hessian of the loss in the outputs times a tangent."""
        return self.loss.times(outputs, tangent, require_targets(batch))

    def root_times(self, outputs: Tensor, noise: Callable[..., Tensor], batch: Any) -> Tensor:
        """The square root of the Hessian of the loss in the outputs times noise ``(k, n, *shape)``."""
        return self.loss.root_times(outputs, noise, require_targets(batch))


@dataclass(frozen=True)
class IdentityMetric:
    """Every output by itself: the rows of the Jacobian."""

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """Unit cotangents, output by output."""
        return diagonal_columns(torch.ones_like(outputs))
