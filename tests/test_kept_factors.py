"""Solves with dense blocks factorise once for a damping: right every time, whatever changes in between."""

import pickle

import pytest
import torch
from cases import build
from torch import nn

import nngeom as nng
from nngeom.pmat.kronecker import KroneckerBlock

EXACT = ("lstm", "layer-norm", "bare", "weight-norm")  # with blocks without Kronecker structure


def measured(name, kind=nng.PMatKFAC):
    case = build(name)
    return nng.FIM(case.model, case.loader, kind)


def dense_solve(m, b, x):
    return torch.linalg.solve(m.to_dense() + x * torch.eye(m.shape[0], dtype=m.dtype), b.unsqueeze(-1)).squeeze(-1)


def counted(monkeypatch):
    calls, plain = [], torch.linalg.cholesky_ex

    def cholesky_ex(m):
        calls.append(m.shape[-1])
        return plain(m)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky_ex)
    return calls


@pytest.mark.parametrize("kind", [nng.PMatKFAC, nng.PMatDense, nng.PMatBlockDiag])
@pytest.mark.parametrize("name", EXACT)
def test_solves_are_those_of_the_dense_matrix(name, kind):
    m = measured(name, kind)
    for x in (0.1, 0.1, 3.0, 0.1):
        for b in (nng.PVector.randn(m.layer_collection, *size, dtype=m.dtype) for size in ((), (2,))):
            torch.testing.assert_close(m.solve(b, x).flat(), dense_solve(m, b.flat(), x), rtol=1e-8, atol=1e-9)
    damping = nng.FactoredTikhonov(0.1)
    torch.testing.assert_close(m.solve(b, damping).flat(), m.inverse(damping).mv(b).flat(), rtol=1e-8, atol=1e-9)


def exact():
    torch.manual_seed(0)
    root = torch.randn(2, 5, 9, dtype=torch.float64)
    return KroneckerBlock(root @ root.mT, torch.full((2, 1, 1), 0.5, dtype=torch.float64))


def solved(block, b, x):
    m = block.a * block.g.reshape(-1, 1, 1) + x * torch.eye(block.a.shape[-1], dtype=b.dtype)
    return torch.linalg.solve(m, b.mT).mT


def test_one_factorisation_a_damping(monkeypatch):
    block, b = exact(), torch.randn(4, 3, 2, 1, 5, dtype=torch.float64)
    calls = counted(monkeypatch)
    for x in (0.2, 0.2, torch.tensor(0.2), 0.7, 0.7):
        damping = nng.Tikhonov(x)
        torch.testing.assert_close(block.solve(b, damping), solved(block, b, float(x)))
    assert len(calls) <= 3  # 0.2 in float32 is another number


def test_what_changed_is_factorised_again(monkeypatch):
    block, b, damping = exact(), torch.randn(2, 1, 5, dtype=torch.float64), nng.Tikhonov(0.2)
    block.solve(b, damping)
    block.a.mul_(2)
    torch.testing.assert_close(block.solve(b, damping), solved(block, b, 0.2))
    block.g.add_(1)
    torch.testing.assert_close(block.solve(b, damping), solved(block, b, 0.2))


def test_gradients_pass():
    block, b = exact(), torch.randn(2, 1, 5, dtype=torch.float64)
    block.solve(b, nng.Tikhonov(0.2))
    x = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(block.solve(b, nng.Tikhonov(x)).sum(), x)
    (wanted,) = torch.autograd.grad(solved(block, b, x).sum(), x)
    torch.testing.assert_close(got, wanted)
    a = block.a.clone().requires_grad_()
    (got,) = torch.autograd.grad(KroneckerBlock(a, block.g).solve(b, nng.Tikhonov(0.2)).sum(), a)
    (wanted,) = torch.autograd.grad(solved(KroneckerBlock(a, block.g), b, 0.2).sum(), a)
    torch.testing.assert_close(got + got.mT, wanted + wanted.mT)  # of a symmetric matrix


def test_a_singular_block_says_how_much_damping_it_needs():
    block = exact()
    flat = KroneckerBlock(block.a[:, :, :1] @ block.a[:, :1], block.g)
    with pytest.raises(nng.SingularError, match="use a damping above") as error:
        flat.solve(torch.ones(2, 1, 5, dtype=torch.float64), nng.Tikhonov(-1.0))
    assert error.value.needed > 0


def test_files_hold_no_factor():
    m = measured(EXACT[0])
    b = nng.PVector.randn(m.layer_collection, dtype=m.dtype)
    before, held = len(pickle.dumps(m)), m.nbytes()
    wanted = m.solve(b, 0.1).flat()
    assert len(pickle.dumps(m)) == before and m.nbytes() == held
    torch.testing.assert_close(pickle.loads(pickle.dumps(m)).solve(b, 0.1).flat(), wanted)


def test_indefinite_and_cut_off_solves_take_eigenvalues():
    block, b = exact(), torch.randn(2, 1, 5, dtype=torch.float64)
    minus = block.scaled(-1.0)
    torch.testing.assert_close(minus.solve(b, nng.Tikhonov(0.01, indefinite=True)), solved(minus, b, 0.01))
    torch.testing.assert_close(block.solve(b, nng.Cutoff(1e-10)), solved(block, b, 0.0))


def test_a_recurrent_model_of_a_loop():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    torch.manual_seed(0)
    model, x = Cell().double(), torch.randn(5, 6, 3, dtype=torch.float64)
    m = nng.FIM(model, (x, None), nng.PMatKFAC)
    b = nng.PVector.randn(m.layer_collection, dtype=m.dtype)
    for _ in range(2):
        torch.testing.assert_close(m.solve(b, 1e-3).flat(), dense_solve(m, b.flat(), 1e-3), rtol=1e-6, atol=1e-6)
