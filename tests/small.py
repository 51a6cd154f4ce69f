"""Small models written where they are tested, and the check that most of them take."""

from __future__ import annotations

import reference
import torch
from torch import Tensor, nn

import nngeom as nng


def normal(*shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def model_of(*layers: nn.Module) -> nn.Module:
    """The layers one after the other, with seeded parameters."""
    torch.manual_seed(3)
    m = nn.Sequential(*layers).double()
    for p in m.parameters():
        p.data.copy_(0.5 * torch.randn(p.shape, dtype=torch.float64))
    return m.eval()


class Function(nn.Module):
    """A model written as a function of itself and its inputs, with these parameters or modules."""

    def __init__(self, f, **parameters):
        super().__init__()
        self.f = f
        for name, value in parameters.items():
            setattr(self, name, value if isinstance(value, nn.Module) else nn.Parameter(value))

    def forward(self, *x, **k):
        return self.f(self, *x, **k)


def require_fisher(model: nn.Module, inputs: Tensor) -> None:
    """The dense Fisher matrix, and the diagonal by its own path, against autograd loops."""
    f = reference.fisher(model, inputs)
    loader = [(inputs[: len(inputs) // 2],), (inputs[len(inputs) // 2 :],)]
    torch.testing.assert_close(nng.FIM(model, loader, nng.PMatDense).to_dense(), f, rtol=1e-8, atol=1e-12)
    diagonal = nng.FIM(model, loader, nng.PMatDiag).diag().flat()
    torch.testing.assert_close(diagonal, f.diagonal(), rtol=1e-8, atol=1e-12)
