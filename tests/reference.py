"""Dense truths, independent of the library: autograd loops over single examples and outputs, in the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def parameters(model: nn.Module) -> list[Tensor]:
    """The trainable parameters, in order."""
    return [p for p in model.parameters() if p.requires_grad]


def jacobian(model: nn.Module, inputs: Tensor, function=None) -> Tensor:
    """``(c, n, d)``: every output of every example by itself."""
    params, rows = parameters(model), []
    for x in inputs:
        out = (function or model)(x[None])[0].flatten()
        example = []
        for f in out:
            grads = torch.autograd.grad(f, params, retain_graph=True, allow_unused=True)
            example.append(
                torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, params)])
            )
        rows.append(torch.stack(example))
    return torch.stack(rows, 1)


def sandwich(j: Tensor, metric: Tensor) -> Tensor:
    """``1/n sum_i J_i^T L_i J_i`` for ``j (c, n, d)`` and ``metric (n, c, c)``."""
    return torch.einsum("cnd,nce,enf->df", j, metric, j) / j.shape[1]


def softmax_metric(logits: Tensor) -> Tensor:
    """``diag(p) - p p^T``, ``(n, c, c)``."""
    p = logits.detach().softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


def fisher(model: nn.Module, inputs: Tensor) -> Tensor:
    """The exact categorical Fisher matrix, ``(d, d)``."""
    return sandwich(jacobian(model, inputs), softmax_metric(model(inputs)))


def loss_gradients(model: nn.Module, inputs: Tensor, targets, loss) -> Tensor:
    """``(n, d)``: the gradient of each example's loss."""
    params, rows = parameters(model), []
    for x, y in zip(inputs, targets):
        value = loss(model(x[None]), y[None]).sum()
        grads = torch.autograd.grad(value, params, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, params)]))
    return torch.stack(rows)


def hessian(model: nn.Module, inputs: Tensor, targets, loss) -> Tensor:
    """The Hessian of the mean loss, ``(d, d)``, by double backward."""
    params = parameters(model)
    grads = torch.autograd.grad(loss(model(inputs), targets).mean(), params, create_graph=True, allow_unused=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, params)])
    rows = []
    for f in flat:
        second = (
            torch.autograd.grad(f, params, retain_graph=True, allow_unused=True)
            if f.requires_grad
            else [None] * len(params)
        )
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(second, params)]))
    return torch.stack(rows)
