"""The contract of parameter-space matrices: every representation on every model of the zoo, one property a test."""

import functools
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from cases import CASES, DIAGONAL, PARAMETER_SPACE, STORED, TRACE, WHOLE, Case, build, representation
from torch import Tensor

import nngeom as nng

f64 = torch.float64


@dataclass(frozen=True)
class Measured:
    """A Fisher matrix, what its entries are, and the exact matrix."""

    kind: str
    case: Case
    fisher: Tensor
    m: Any
    dense: Tensor

    def close(self, x, y, tol=1e-9):
        """Equal up to rounding, relative to the largest entry of the exact matrix."""
        torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(self.fisher.abs().max()))

    def vector(self, *batch):
        """A random vector of the parameters."""
        return nng.PVector.randn(self.m.layer_collection, *batch, dtype=f64)

    @functools.cached_property
    def damping(self) -> float:
        """One that makes the matrix positive definite."""
        return 0.1 + 1.1 * max(0.0, -float(torch.linalg.eigvalsh(self.dense).min()))

    @functools.cached_property
    def damped(self) -> Tensor:
        """The entries with the damping added."""
        return self.dense + self.damping * torch.eye(len(self.dense), dtype=f64)


@functools.cache
def truth(name):
    """A model of the zoo and its exact Fisher matrix."""
    torch.set_num_threads(1)
    case = build(name)
    return case, reference.fisher(case.model, case.inputs)


@pytest.fixture(params=CASES, scope="module")
def exact(request):
    return truth(request.param)


@pytest.fixture(params=PARAMETER_SPACE, scope="module")
def measured(request, exact):
    case, fisher = exact
    m = nng.FIM(case.model, case.loader, representation(request.param, case.model))
    return Measured(request.param, case, fisher, m, m.to_dense())


def only(*kinds):
    """Of these representations alone; each is measured once for all tests."""
    return pytest.mark.parametrize("measured", kinds, indirect=True, scope="module")


def test_symmetric_of_its_shape_and_dtype(measured):
    m, d = measured.m, len(measured.fisher)
    assert m.shape == (d, d) and m.dtype == f64 and measured.dense.shape == (d, d)
    measured.close(measured.dense, measured.dense.T)


@only(*WHOLE)
def test_all_entries_are_exact(measured):
    measured.close(measured.dense, measured.fisher)


@only(*DIAGONAL)
def test_the_diagonal_is_exact(measured):
    measured.close(measured.dense.diagonal(), measured.fisher.diagonal())


@only(*TRACE)
def test_the_trace_is_exact(measured):
    measured.close(measured.dense.trace(), measured.fisher.trace())


@only("block-diag")
def test_entries_of_layers_are_exact(measured):
    for lo, hi in blocks(measured.m.layer_collection):
        measured.close(measured.dense[lo:hi, lo:hi], measured.fisher[lo:hi, lo:hi])


def blocks(lc):
    """Flat ranges of the layers."""
    table, at = [], 0
    for layer in dict.fromkeys(lc.layers):
        size = sum(torch.Size(s).numel() for s, own in zip(lc.shapes, lc.layers) if own == layer)
        table.append((at, at + size))
        at += size
    return table


def test_products(measured):
    v = measured.vector(2)
    measured.close(measured.m.mv(v).flat(), v.flat() @ measured.dense)
    measured.close((measured.m @ v).flat(), v.flat() @ measured.dense)


def test_forms(measured):
    v = measured.vector(2)
    measured.close(measured.m.vTMv(v), ((v.flat() @ measured.dense) * v.flat()).sum(-1), 1e-8)


def test_trace_diagonal_and_norm(measured):
    measured.close(measured.m.trace(), measured.dense.trace())
    measured.close(measured.m.diag().flat(), measured.dense.diagonal())
    measured.close(measured.m.norm("fro"), measured.dense.norm())


def test_solves_and_inverses(measured):
    v, damping, tol = measured.vector(2), measured.damping, 1e-5 if measured.kind == "implicit" else 1e-8
    expected = torch.linalg.solve(measured.damped, v.flat().T).T
    for solved in (measured.m.solve(v, damping), measured.m.inverse(damping).mv(v)):
        torch.testing.assert_close(solved.flat(), expected, rtol=tol, atol=tol * float(expected.abs().max()))


def test_multiples(measured):
    v = measured.vector(2)
    measured.close((2 * measured.m - measured.m / 2).mv(v).flat(), 1.5 * (v.flat() @ measured.dense))


def test_as_an_operator_of_scipy(measured):
    v = measured.vector().flat()
    measured.close(torch.as_tensor(measured.m.to_scipy() @ v.numpy()), measured.dense @ v)


@only("implicit")
def test_what_products_cannot_give_is_refused(measured):
    for refused in (measured.m.eigh, measured.m.logdet, lambda: measured.m.sample(2, 0.1)):
        with pytest.raises(nng.UnsupportedError, match="lanczos"):
            refused()


@only("implicit")
def test_leading_eigenvalues_from_products(measured):
    top, _ = measured.m.lanczos(1, generator=torch.Generator().manual_seed(0))
    measured.close(top[0], torch.linalg.eigvalsh(measured.fisher)[-1], 1e-6)


@only(*STORED)
def test_eigenvalues_and_eigenvectors(measured):
    values, basis = measured.m.eigh()
    u = basis.to_dense()
    measured.close(values, torch.linalg.eigvalsh(measured.dense), 1e-8)
    torch.testing.assert_close(u.T @ u, torch.eye(len(u), dtype=f64), rtol=0, atol=1e-9)
    measured.close(u @ values.diag() @ u.T, measured.dense, 1e-8)
    v = measured.vector(2)
    measured.close(basis.T.mv(basis.mv(v)).flat(), v.flat())


@only(*STORED)
def test_log_determinant(measured):
    expected = torch.logdet(measured.damped)
    torch.testing.assert_close(measured.m.logdet(measured.damping), expected, rtol=1e-7, atol=1e-7)


@only(*STORED)
def test_samples_are_finite(measured):
    root = measured.m.sample(3, measured.damping, generator=torch.Generator().manual_seed(0))
    assert root.shape == (3, len(measured.dense)) and bool(torch.isfinite(root.flat()).all())


@only(*STORED)
def test_pickled_and_back(measured):
    copy = pickle.loads(pickle.dumps(measured.m))
    assert torch.equal(copy.to_dense(), measured.dense)
    assert type(copy) is type(measured.m) and copy.examples == measured.case.n


@only(*STORED)
def test_to_another_dtype(measured):
    assert measured.m.to(torch.float32).mv(measured.vector()).dtype == torch.float32


def test_ekfac_is_no_farther_than_kfac(exact):
    """In the norm of the difference to the exact matrix (George et al. 2018)."""
    case, fisher = exact
    k, e = (nng.FIM(case.model, case.loader, r).to_dense() for r in (nng.PMatKFAC, nng.PMatEKFAC))
    assert (fisher - e).norm() <= (fisher - k).norm() * (1 + 1e-9)


@pytest.mark.parametrize("kind", STORED)
def test_samples_have_the_damped_inverse_as_covariance(kind):
    c = build("mlp")
    m = nng.FIM(c.model, c.loader, representation(kind, c.model))
    damping = 0.5 + max(0.0, -2 * float(torch.linalg.eigvalsh(m.to_dense()).min()))
    x = m.sample(40_000, damping, generator=torch.Generator().manual_seed(0)).flat()
    expected = m.inverse(damping).to_dense()
    assert ((x.T @ x / len(x)) - expected).norm() / expected.norm() < 0.05


def test_nothing_is_left_on_the_model(exact):
    case, _ = exact
    left = lambda: {
        n: (set(vars(m)), dict(m._forward_hooks), dict(m._backward_hooks)) for n, m in case.model.named_modules()
    }
    before = left()
    nng.FIM(case.model, case.loader, nng.PMatDiag)
    assert before == left()
    assert all(p.grad is None for p in case.model.parameters())
