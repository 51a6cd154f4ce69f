"""Plain ``torch.func``: a gradient or a Jacobian of one example, mapped over the examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from benchmarks.workloads import Workload


def _one(w: Workload):
    """``(parameters, one example) -> [c]``."""
    return lambda parameters, x: functional_call(w.model, parameters, (x[None],))[0]


def _detached(w: Workload) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in w.parameters.items()}


def _joined(parts: list[dict[str, Tensor]], lead: int) -> Tensor:
    """Dictionaries of ``[n, *lead, *shape]``, a batch each, to ``[n, *lead, d]``."""
    return torch.cat([torch.cat([t.flatten(1 + lead) for t in part.values()], -1) for part in parts])


def _rows(w: Workload) -> tuple[Any, dict[str, Tensor]]:
    """``(parameters, examples) -> {name: [n, c, *shape]}``, and the parameters."""
    return vmap(jacrev(_one(w)), (None, 0)), _detached(w)


def rows(w: Workload):
    """Explicit Jacobian rows, a dictionary over parameters a batch."""
    of, parameters = _rows(w)
    return lambda: [of(parameters, x) for x, _ in w.batches], lambda parts: _joined(parts, 1).transpose(0, 1).flatten()


def gram(times: int):
    """Jacobian contraction as in the tutorial on neural tangent kernels, which computes the Jacobian of each side."""

    def setup(w: Workload):
        of, parameters = _rows(w)
        x = w.batches[0][0]

        def run() -> Tensor:
            sides = [of(parameters, x) for _ in range(times)]
            pairs = zip(sides[0].values(), sides[-1].values())
            return sum(torch.einsum("nkp,mlp->nmkl", a.flatten(2), b.flatten(2)) for a, b in pairs)  # type: ignore[return-value]

        return run, lambda k: k.permute(2, 0, 3, 1).flatten()

    return setup


def trace(w: Workload):
    """Squared entries of the rows, summed."""
    of, parameters = _rows(w)
    run = lambda: sum(t.square().sum() for x, _ in w.batches for t in of(parameters, x).values())
    return run, lambda t: t.reshape(1)


def fisher_vector(w: Workload):
    """One forward-mode and one reverse-mode product a batch, the softmax's Fisher matrix between them."""
    parameters = _detached(w)
    parts = w.vector().split([p.numel() for p in parameters.values()])
    tangents = {name: t.view_as(p) for (name, p), t in zip(parameters.items(), parts)}

    def run() -> Tensor:
        total = None
        for x, _ in w.batches:
            f = lambda q, x=x: functional_call(w.model, q, (x,))
            outputs, moved = jvp(f, (parameters,), (tangents,))
            p = outputs.softmax(-1)
            pulled = vjp(f, parameters)[1](p * moved - p * (p * moved).sum(-1, keepdim=True))[0]
            total = pulled if total is None else {name: total[name] + t for name, t in pulled.items()}
        return torch.cat([t.flatten() for t in total.values()]) / w.n

    return run, lambda v: v


def loss_gradients(w: Workload):
    """Gradients of the loss of each example, a dictionary over parameters a batch."""
    of = _one(w)
    each = vmap(grad(lambda parameters, x, y: F.cross_entropy(of(parameters, x), y)), (None, 0, 0))
    parameters = _detached(w)
    return lambda: [each(parameters, x, y) for x, y in w.batches], lambda parts: _joined(parts, 0).flatten()


def penalty_step(w: Workload):
    """Gradient of the loss plus 1e-3 times the mean squared norm of the rows: a second derivative through them."""
    of, _ = _rows(w)
    x, y = w.batches[0]

    def run() -> tuple[Tensor, ...]:
        parameters = w.parameters
        squares = sum(t.square().sum() for t in of(parameters, x).values())
        loss = F.cross_entropy(w.model(x), y) + 1e-3 * squares / len(x)
        return torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)

    return run, lambda g: torch.cat([t.flatten() for t in g])


CONTENDERS = {
    "torch.func": {
        "J5": rows,
        "J6": gram(1),
        "J7": trace,
        "J8": fisher_vector,
        "J9": loss_gradients,
        "J11": penalty_step,
    },
    "torch.func (tutorial)": {"J6": gram(2)},
}
