"""BackPACK: quantities that backward passes of extended modules leave on the parameters. Its Kronecker factors leave
out the bias.
"""

from __future__ import annotations

import copy
from typing import Any

import backpack
import torch
from backpack import extensions
from torch import Tensor, nn

from benchmarks import truth
from benchmarks.workloads import Workload


def _backward(w: Workload, extension: Any, reduction: str, read: Any):
    """``run`` that reads ``read(parameters, share of the examples)`` after the backward pass of every batch."""
    model = backpack.extend(copy.deepcopy(w.model))
    loss = backpack.extend(nn.CrossEntropyLoss(reduction=reduction))

    def run() -> list[Any]:
        found = []
        for x, y in w.batches:
            with backpack.backpack(extension()):
                loss(model(x), y).backward()
            found.append(read(dict(model.named_parameters()), len(x) / w.n))
            for p in model.parameters():
                p.grad = None
        return found

    return run


def diagonal(w: Workload):
    """Exact, of a softmax."""
    read = lambda named, share: share * torch.cat([p.diag_ggn_exact.flatten() for p in named.values()])
    run = _backward(w, extensions.DiagGGNExact, "mean", read)
    return lambda: sum(run()), lambda d: d


def monte_carlo_kfac(w: Workload):
    """One drawn label an example; factors ``[g, a]`` of the weights."""
    layers = [f"{name}.weight" for name in truth.kronecker_layers(w)]
    run = _backward(
        w, extensions.KFAC, "mean", lambda named, share: [[share * f for f in named[name].kfac] for name in layers]
    )

    def merged() -> list[list[Tensor]]:
        return [[sum(factors) for factors in zip(*batches)] for batches in zip(*run())]  # type: ignore[misc]

    return merged, lambda found: torch.cat([(a / a.norm()).flatten() for _, a in found])


def loss_gradients(w: Workload):
    """Gradients of the loss of each example, left on the parameters."""
    run = _backward(w, extensions.BatchGrad, "sum", lambda named, share: [p.grad_batch for p in named.values()])
    return run, lambda parts: torch.cat([torch.cat([t.flatten(1) for t in part], 1) for part in parts]).flatten()


CONTENDERS = {"backpack": {"J1": diagonal, "J3": monte_carlo_kfac, "J9": loss_gradients}}
