"""A loss of the outputs, one number an example, and what any such function can be asked by automatic
differentiation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.errors import ArgumentError, ArgumentTypeError, OutputError, SizeError
from nngeom.cotangents.likelihood import columns_times
from nngeom.cotangents.own_examples import gradient, require_own, undrawn
from nngeom.cotangents.precise import Precise
from nngeom.cotangents.reading import Reading
from nngeom.sweep.columns import Columns

OUTPUT_LIMIT = 4096  # outputs an example whose Hessian in them is formed
ROUNDING = 1e-8  # negative eigenvalues of a Hessian that are so much smaller than the largest are zero


class Loss(Reading):
    """A per-example loss ``(outputs, targets) -> (n,)``, summed over the outputs and positions of an example."""

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        raise ArgumentTypeError("a Loss defines __call__(outputs, targets) -> (n,)")

    def precisely(self, outputs: Tensor, targets: Any) -> Tensor:
        """The loss of ``outputs`` and ``targets`` with its graph, such that derivatives do not cancel if it is made of
        torch's own functions.
        """
        with Precise():
            return self(outputs, targets)

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        """``d loss / d outputs``, ``(n, *shape)``, at the ``targets`` of the batch."""
        with undrawn(outputs), torch.enable_grad():
            require_own(self, outputs, targets)
            f = outputs.detach().requires_grad_()
            return gradient(self.precisely(f, targets), f)

    def slope(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """:meth:`gradient` at ``outputs`` and ``targets`` with its own derivatives in the outputs; ``None`` where it is
        known by differentiating the loss alone.
        """
        return None

    def require_separate(self, outputs: Tensor, targets: Any) -> None:
        """Raise :class:`ArgumentError` where the loss of an example changes with the ``outputs`` of others, at the
        ``targets`` of the batch; one with a gradient of its own says of each that it is its example's.
        """
        if type(self).gradient is Loss.gradient:
            self.gradient(outputs, targets)

    def square_root(self, outputs: Tensor, targets: Any) -> Columns:
        """Cotangents ``v [k, n, *shape]``, ``sum_k v v^T`` the Hessian of the loss in ``outputs``, at ``targets``."""
        with undrawn(outputs):
            return _hessian_root(self, outputs, targets)

    def times(self, outputs: Tensor, tangent: Tensor, targets: Any) -> Tensor:
        """The Hessian of the loss in ``outputs``, at ``targets``, times ``tangent (n, *shape)``."""
        with undrawn(outputs), torch.enable_grad():
            require_own(self, outputs, targets)
            f = outputs.detach().requires_grad_()
            slope = gradient(self.precisely(f, targets), f, create_graph=True)
            return torch.autograd.grad(slope, f, tangent)[0] if slope.requires_grad else torch.zeros_like(tangent)

    def root_times(self, outputs: Tensor, noise: Callable[..., Tensor], targets: Any) -> Tensor:
        """``L r (k, n, *shape)`` for the square root ``L`` of the Hessian of the loss in ``outputs``, at ``targets``,
        with ``noise`` as in :class:`Likelihood`.
        """
        return columns_times(self.square_root(outputs, targets), outputs, noise)


@dataclass(frozen=True)
class CallableLoss(Loss):
    """A user's function ``(outputs, targets) -> (n,)``, run under :class:`Precise`."""

    function: Callable[[Tensor, Any], Tensor]

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        with Precise():
            value = self.function(outputs, targets)
        if not isinstance(value, Tensor) or value.shape != outputs.shape[:1]:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise OutputError(
                f"the loss returned {given}; expected one number an example, ({outputs.shape[0]},): use "
                "reduction='none' and sum over outputs"
            )
        return value


def _hessian_root(loss: Loss, outputs: Tensor, targets: Any) -> Columns:
    """The symmetric root of each example's Hessian in its outputs, by double backward; raises where it is not
    convex."""
    width = outputs[0].numel()
    if width > OUTPUT_LIMIT:
        raise SizeError(
            f"the outputs have {width} numbers an example; the Gauss-Newton matrix of a function of them takes "
            f"{width} x {width} an example, the limit "
            f"is {OUTPUT_LIMIT}: use 'cross_entropy', 'mse' or CrossEntropy(...), whose curvature is known, or a "
            "Loss with a square_root of its own"
        )
    require_own(loss, outputs, targets)
    h, eps = _in_float64(loss, outputs, targets)
    values, vectors = linalg.eigh((h + h.mT) / 2)
    least, most = values.min(), values.abs().max()
    rounding = max(ROUNDING, 10 * eps)
    if bool(least < -rounding * most.clamp_min(1e-300)) and bool(
        least < -1e3 * eps * _usual_curvature(loss, outputs, targets)
    ):
        raise ArgumentError(
            f"the loss is not convex in the outputs (an eigenvalue of its Hessian is {float(least):.3e}); the "
            "Gauss-Newton matrix needs a convex loss: "
            "use Hessian"
        )
    root = (vectors * values.clamp_min(0).sqrt().unsqueeze(1)).permute(2, 0, 1).to(outputs)  # [k n c]
    return Columns(root.shape[0], lambda lo, hi: root[lo:hi].reshape(hi - lo, *outputs.shape))


def _in_float64(loss: Loss, outputs: Tensor, targets: Any) -> tuple[Tensor, float]:
    """The Hessian ``[n, c, c]`` in the outputs and the rounding of the arithmetic it was computed in."""
    try:
        return _output_hessian(loss, outputs.double(), targets), torch.finfo(torch.float64).eps
    except RuntimeError:  # a function with tensors of its own, in the dtype of the outputs
        return _output_hessian(loss, outputs, targets).double(), torch.finfo(outputs.dtype).eps


def _usual_curvature(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """The largest curvature where the outputs are all zero: what saturated ones are the remains of, to rounding.

    Zero where the function is not defined there, which says nothing.
    """
    most = _in_float64(loss, torch.zeros_like(outputs), targets)[0].flatten(1).abs().amax()
    return most if bool(torch.isfinite(most)) else torch.zeros_like(most)


def _output_hessian(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """``[n, c, c]`` over the flattened outputs of every example."""
    with torch.enable_grad():
        f = outputs.detach().requires_grad_()
        slope = gradient(loss.precisely(f, targets), f, create_graph=True).flatten(1)
        if not slope.requires_grad:
            return torch.zeros(len(f), slope.shape[1], slope.shape[1], dtype=f.dtype, device=f.device)
        rows = [
            torch.autograd.grad(slope[:, j].sum(), f, retain_graph=True)[0].flatten(1) for j in range(slope.shape[1])
        ]
    return torch.stack(rows, 1)
