"""Products with the Jacobian of the outputs, without forming it: forward mode, or double backward, and reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nngeom.core.errors import NNGeomError
from nngeom.generator.kernels import WRITTEN_OUT, twice_differentiable
from nngeom.generator.task import Batch, Task, gradients_on


@dataclass(frozen=True, eq=False)
class Linearization:
    """Jacobian products of one task: ``J v`` in forward mode (or double backward), ``J^T u`` in reverse mode."""

    task: Task

    def jvp(self, batch: Batch, v: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs (with their graph) and ``J v``, for one tangent."""
        with gradients_on(), twice_differentiable():
            try:
                with forward_ad.dual_level(), ReverseConventions():
                    duals = {name: forward_ad.make_dual(p, v[name]) for name, p in self.task.parameters.items()}
                    outputs = self._run(batch, duals)
                    primal, tangent = forward_ad.unpack_dual(outputs)
                return primal, torch.zeros_like(primal) if tangent is None else tangent.detach()
            except (NNGeomError, torch.OutOfMemoryError):
                raise
            except RuntimeError:  # no forward mode for some operation, or one that fails (group norm on channels-last tensors)
                pass
            outputs = self.task.run(batch)
            u = torch.zeros_like(outputs, requires_grad=True)
            params = list(self.task.parameters.values())
            pulled = torch.autograd.grad(outputs, params, u, create_graph=True, allow_unused=True)
            inner = torch.stack([(g * v[name]).sum() for name, g in zip(self.task.parameters, pulled) if g is not None]).sum()
            tangent = torch.autograd.grad(inner, u, retain_graph=True)[0]
            return outputs, tangent.detach()

    def vjp(self, outputs: Tensor, u: Tensor) -> Tensor:
        """``J^T u`` as a flat vector."""
        params = list(self.task.parameters.values())
        grads = torch.autograd.grad(outputs, params, u, allow_unused=True)
        return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(grads, params)])

    def _run(self, batch: Batch, parameters: dict[str, Tensor]) -> Tensor:
        """The outputs with other tensors in the place of the parameters; a user's function may call the model anyhow."""
        wrapper = _Caller(self.task.model, lambda: self.task.run(batch))
        return functional_call(wrapper, {f"model.{name}": p for name, p in parameters.items()}, ())


class _Caller(torch.nn.Module):
    """A module around the model whose forward calls back, so that ``functional_call`` reaches a user's function."""

    def __init__(self, model: torch.nn.Module, call: Callable[[], Tensor]):
        super().__init__()
        self.model, self._call = model, call

    def forward(self) -> Tensor:
        """Call back."""
        return self._call()


class ReverseConventions(TorchFunctionMode):
    """What forward mode does unlike reverse mode, made the same.

    It ignores ``padding_idx`` of embeddings, whose row gets no gradient in reverse mode. The tangents of layer and instance
    norm take the saved mean and deviation for constants when they are differentiated in the input (torch 2.13), and those of
    a softmax fail then: where the input requires gradients, the three are written out.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = WRITTEN_OUT.get(func)
        if written is not None and torch.is_grad_enabled() and args and args[0].requires_grad:
            return written(*args, **kwargs)
        out = func(*args, **kwargs)
        if func is F.embedding:
            named = dict(zip(("input", "weight", "padding_idx"), args)) | kwargs
            if named.get("padding_idx") is not None:
                padding = named["input"] == named["padding_idx"] % named["weight"].shape[0]
                out = torch.where(padding.unsqueeze(-1), out.detach(), out)
        return out
