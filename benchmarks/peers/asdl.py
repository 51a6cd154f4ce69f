"""ASDL (distributed as ``asdfghjkl``): contexts of operations around a forward and backward pass."""

from __future__ import annotations

from typing import Any

import torch
from asdl.fisher import FisherConfig, get_fisher_maker
from asdl.gradient import batch_gradient
from asdl.matrices import FISHER_EXACT, FISHER_MC, SHAPE_DIAG, SHAPE_KRON
from torch import Tensor
from torch.nn import functional as F

from benchmarks import truth
from benchmarks.workloads import Workload


def _fisher(w: Workload, fisher_type: str, shape: str) -> Any:
    """A run that leaves ``module.fisher`` on the modules and returns the model."""
    config = FisherConfig(fisher_type=fisher_type, fisher_shapes=[shape], loss_type="cross_entropy", data_size=w.n)
    maker = get_fisher_maker(w.model, config)

    def run() -> Any:
        for j, (x, _) in enumerate(w.batches):
            maker.setup_model_call(w.model, x)
            maker.forward_and_backward(accumulate=j > 0)
        return w.model

    return run


def diagonal(w: Workload):
    """Exact, of a softmax."""

    def result(model: Any) -> Tensor:
        layers = dict(model.named_modules())
        found = {}
        for name in w.parameters:
            layer, kind = name.rpartition(".")[::2]
            found[name] = getattr(layers[layer].fisher.diag, kind)
        return torch.cat([t.flatten() for t in found.values()])

    return _fisher(w, FISHER_EXACT, SHAPE_DIAG), result


def monte_carlo_kfac(w: Workload):
    """One drawn label an example; the factors leave out the bias."""

    def factors(model: Any) -> Tensor:
        layers = dict(model.named_modules())
        found = [layers[name].fisher.kron.A for name in truth.kronecker_layers(w)]
        return torch.cat([(a / a.norm()).flatten() for a in found])

    return _fisher(w, FISHER_MC, SHAPE_KRON), factors


def loss_gradients(w: Workload):
    """Gradients of the loss of each example."""

    def closure(x: Tensor, y: Tensor) -> None:
        w.model.zero_grad()
        F.cross_entropy(w.model(x), y, reduction="sum").backward()

    run = lambda: [batch_gradient(w.model, lambda x=x, y=y: closure(x, y)) for x, y in w.batches]
    return run, lambda parts: torch.cat(parts).flatten()


CONTENDERS = {"asdl": {"J1": diagonal, "J3": monte_carlo_kfac, "J9": loss_gradients}}
