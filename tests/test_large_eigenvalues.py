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


@BOTH
@pytest.mark.parametrize("along", ["any", "rows"])
@pytest.mark.parametrize("condition", [1e6, 1e9, 1e12, 1e16, 1e24, 1e34])
@pytest.mark.parametrize("added", [None, nng.PMatDiag, nng.PMatKFAC])
def test_solves_with_rows_at_any_condition_number(added, condition, along, dtype):
    """Right to rounding for vectors in any direction; for those along the rows as far as their own rounding allows, or
    better; a :class:`SingularError` is an answer too, beside blocks.
    """
    model, loader = data(dtype)
    blocks = None if added is None else 1e-2 * nng.FIM(model, loader, added, likelihood="gaussian")
    lc = nng.LayerCollection.from_model(model)
    rows = torch.randn(4, lc.numel, dtype=torch.float64)
    rows = (rows * (condition / torch.linalg.matrix_norm(rows, 2) ** 2) ** 0.5).to(dtype)
    m, eps = nng.PMatLowRank.from_rows(lc, rows), torch.finfo(dtype).eps
    m = m if blocks is None else blocks + m
    b = torch.randn(3, lc.numel, dtype=dtype)
    b = b if along == "any" else torch.randn(3, 4, dtype=dtype) @ rows
    expected = exactly(None if blocks is None else blocks.to_dense().double(), rows.double(), b.double())
    try:
        found = m.solve(nng.PVector(lc, b), 1.0).flat().double()
    except nng.SingularError:
        assert added is not None and condition * eps > 0.1
        return
    error = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max()
    assert error < 100 * eps * (1 if along == "any" else condition)


def exactly(blocks, rows, b):
    """``(B + R^T R + I)^-1 b``, what lies outside of the rows projected twice."""
    root = torch.linalg.cholesky(torch.eye(rows.shape[1], dtype=rows.dtype) + (0 if blocks is None else blocks))
    _, s, v = torch.linalg.svd(torch.linalg.solve_triangular(root, rows.T, upper=False).T, full_matrices=False)
    y = torch.linalg.solve_triangular(root, b.T, upper=False)
    outside = y - v.T @ (v @ y)
    z = outside - v.T @ (v @ outside) + v.T @ ((v @ y) / (1 + s.square())[:, None])
    return torch.linalg.solve_triangular(root.T, z, upper=True).T


@pytest.mark.parametrize("condition", [1e8, 1e11, 1e14])
def test_solves_along_rows_in_single_precision_are_those_of_double(condition):
    """A gradient lies along the rows of its examples: beyond float32 the numbers given are solved for in float64."""
    torch.manual_seed(0)
    lc = nng.LayerCollection.from_model(nn.Linear(20, 24))
    rows = torch.randn(4, lc.numel) * (condition / lc.numel) ** 0.5
    b = torch.randn(3, 4) @ rows
    found = nng.PMatLowRank.from_rows(lc, rows).solve(nng.PVector(lc, b), 1.0)
    expected = nng.PMatLowRank.from_rows(lc, rows.double()).solve(nng.PVector(lc, b.double()), 1.0)
    assert (
        found.dtype == torch.float32
        and (found.to(torch.float64) - expected).norm().max() < 1e-6 * expected.norm().max()
    )


@pytest.mark.parametrize("width", [24, 40])  # the larger is above the side up to which sums are made dense
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e9])
@pytest.mark.parametrize("kind", ["kfac + low-rank", "diag + low-rank", "kfac + ekfac", "kfac + diag"])
def test_functions_of_sums_in_single_precision_are_those_of_double(kind, condition, width):
    """Of the numbers given: parts have small eigenvalues to more digits than the entries of their dense sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 3))
    loader = [(torch.randn(12, 10), torch.arange(12) % 3)]
    one, other = (nng.FIM(model, loader, k) for k in {**SUMS, "kfac + diag": (nng.PMatKFAC, nng.PMatDiag)}[kind])
    m = 1e-3 * one + other
    wide = m.to(torch.float64)
    damping = float(torch.linalg.matrix_norm(wide.to_dense(), 2)) / condition
    b = nng.PVector.randn(m.layer_collection, 2)
    for function in (
        lambda m, b: m.logdet(damping),
        lambda m, b: m.power(-0.5, damping).mv(b).flat(),
        lambda m, b: m.inverse(damping).mv(b).flat(),
        lambda m, b: m.apply(lambda values: (values + damping).clamp_min(damping).log()).mv(b).flat(),
    ):
        found, expected = function(m, b), function(wide, b.to(torch.float64))
        assert found.dtype == torch.float32
        assert float((found - expected).norm() / expected.norm()) < 1e-5
