"""What lies along large eigenvalues is solved for as exactly as the condition number allows, not its square."""

import pytest
import torch
from cases import STORED, representation
from torch import nn

import nngeom as nng

BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])


def data(dtype, n=8):
    """More parameters than rows, and rows that are nearly the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24, bias=False), nn.Tanh(), nn.Linear(24, 3, bias=False)).to(dtype)
    x = torch.randn(1, 20) + torch.logspace(0, -4, n).unsqueeze(-1) * torch.randn(n, 20)
    return model, [(x.to(dtype), torch.arange(n) % 3)]


def error(matrix, damping, eps):
    """Of ``x`` recovered from ``(M + damping I) x``, in units of ``eps`` times the condition number."""
    x = matrix.mv(matrix.mv(nng.PVector.randn(matrix.layer_collection, 3, dtype=matrix.dtype)))
    largest = matrix.to_dense().double()
    condition = float(torch.linalg.matrix_norm(largest, 2)) / damping
    wide = x.flat().double() @ largest.T + damping * x.flat().double()
    found = matrix.solve(nng.PVector(x.layer_collection, wide.to(matrix.dtype)), damping)
    return float(((found - x).norm() / x.norm()).max()) / (eps * condition)


SUMS = {
    "kfac + low-rank": (nng.PMatKFAC, nng.PMatLowRank),
    "diag + low-rank": (nng.PMatDiag, nng.PMatLowRank),
    "quasi-diag + low-rank": (nng.PMatQuasiDiag, nng.PMatLowRank),
    "kfac + ekfac": (nng.PMatKFAC, nng.PMatEKFAC),
}


def matrix(kind, dtype):
    """One of a representation, or a sum with rows a thousand times as large as what they are added to."""
    model, loader = data(dtype)
    measure = lambda kind: nng.FIM(model, loader, kind, likelihood="gaussian")
    if kind not in SUMS:
        return measure(representation(kind, model))
    one, other = map(measure, SUMS[kind])
    return 1e-3 * one + other


@BOTH
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("kind", [*STORED, *SUMS])
def test_solves_do_not_square_the_condition_number(kind, condition, dtype):
    m, eps = matrix(kind, dtype), torch.finfo(dtype).eps
    if eps * condition < 0.1:
        top = float(torch.linalg.matrix_norm(m.to_dense().double(), 2))
        try:
            assert error(m, top / condition, eps) < 10
        except nng.SingularError:  # an answer too, of what need not be semi-definite
            assert "quasi-diag" in kind
