"""The first-order Taylor expansion of a network in its parameters, as a network to train."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from nngeom.capture.exchanged import exchanged
from nngeom.capture.fused import ReverseConventions, twice_differentiable
from nngeom.capture.network import gradients_on
from nngeom.capture.remedies import gradients
from nngeom.core.forward_mode import forward_mode
from nngeom.linearized.expansion import Expansion, Refusing, as_outputs


class Linearized(Expansion):
    """``f0(x) + J0(x) (w - w0)``: the expansion of ``model`` at its current parameters ``w0``, trainable in ``w``.

    Call it as the model; outputs have the model's shape. Linear in the parameters, so a loss that is convex in the
    outputs is convex in them, and the tangent kernel never changes. One pass costs about two of the model: the product
    with the Jacobian ``J0`` is a forward-mode derivative, or two backward passes for operations that have none
    (recurrent cells). The gradients are exact, for any optimizer. ``model``, ``delta``, ``reference()`` and errors:
    see :class:`Expansion`. Source: George 2023, thesis, eq. 5.2.3.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The outputs of the linearised model."""
        recording = torch.is_grad_enabled()
        with gradients_on(), twice_differentiable(), Refusing():
            delta = self._displacement(detach=not recording)
            try:
                f0, change = self._forward_mode(delta, args, kwargs)
            except (NotImplementedError, RuntimeError) as error:
                if "forward" not in str(error).lower():
                    raise
                f0, change = self._double_backward(delta, args, kwargs)
        out = f0 if change is None else f0 + change
        return out if recording else out.detach()

    def _forward_mode(
        self, delta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        with forward_mode(), ReverseConventions():
            duals = {name: forward_ad.make_dual(w0, delta[name]) for name, w0 in self._start().items()}
            with exchanged(self.model, duals):
                outputs = as_outputs(self.model(*args, **kwargs))
            return tuple(forward_ad.unpack_dual(outputs))

    def _double_backward(
        self, delta: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """``J v`` is the derivative in ``u`` of ``(J^T u) . v``."""
        start = {name: w0.detach().requires_grad_() for name, w0 in self._start().items()}
        with torch.backends.cudnn.flags(enabled=False):  # its recurrent kernels have no second derivative
            with exchanged(self.model, start):
                f0 = as_outputs(self.model(*args, **kwargs))
            u = torch.zeros_like(f0, requires_grad=True)
            pulled = gradients(f0, list(start.values()), u, create_graph=True)
            terms = [(g * delta[name]).sum() for name, g in zip(start, pulled) if g is not None]
            return f0, torch.autograd.grad(torch.stack(terms).sum(), u, create_graph=True)[0]
