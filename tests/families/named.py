"""What the named examples share: a small model, autograd by the batch, and the two outcomes that are allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nngeom as nng

from .net import Truth

f64 = torch.float64


class Model(nn.Module):
    """Two layers with something in between: ``forward`` is a function of the module and the inputs."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], features: int = 4, hidden: int = 5, outputs: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(features, hidden, dtype=f64), nn.Linear(hidden, outputs, dtype=f64)
        self.function, self.coefficient = forward, 1.0

    def forward(self, x):
        return self.function(self, x)


def plain(m: Any, x: Tensor) -> Tensor:
    """Nothing in between but a tanh."""
    return m.b(m.a(x).tanh())


def inputs(n: int, *shape: int, seed: int = 1) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(n, *(shape or (4,)), dtype=f64, generator=torch.Generator().manual_seed(seed))


def truth(model: nn.Module, *batches: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Truth:
    """Autograd of whole batches."""
    return Truth(call or model, model, [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches])


def holds(measure: Callable[[], Tensor], want: Tensor | Callable[[], Tensor], tolerance: float = 1e-6) -> None:
    """What was measured is right, or a documented error was raised; anything else fails."""
    try:
        got = measure()
    except nng.NNGeomError:
        return
    want = want() if callable(want) else want
    error = float((got.double() - want).norm() / want.norm())
    assert error <= tolerance, f"relative error {error:.2g}"


def jacobian_holds(model: nn.Module, *batches: Tensor, call: Any = None, **options: Any) -> None:
    """The Jacobian, the Fisher matrix and the trace of the kernel of some batches."""
    function = None if call is None else lambda x, *rest: call(x)
    t, loader = truth(model, *batches, call=call), list(batches)
    options = {**options, "function": function}
    holds(lambda: nng.Jacobian(model, loader, **options).tensor, lambda: t.rows)
    holds(lambda: nng.FIM(model, loader, nng.PMatDense, **options).to_dense(), lambda: t.fisher)
    holds(lambda: nng.FIM(model, loader, nng.PMatDiag, **options).diag().flat(), lambda: t.fisher.diagonal())
    holds(lambda: nng.GramMatrix(model, loader, **options).trace(), lambda: t.trace)
