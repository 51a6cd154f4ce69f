"""Eigendecompositions by NumPy's LAPACK: those of torch's, on one thread, for large matrices."""

import sys

import numpy as np
import pytest
import torch

from nngeom.core import lapack, linalg
from nngeom.core.lapack import SIDE


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def matrices(p, *lead):
    torch.manual_seed(0)
    x = torch.randn(*lead, 2 * p, p, dtype=torch.float64)
    return x.mT @ x / p


@pytest.mark.parametrize("lead", [(), (2,), (2, 1), (0,)], ids=str)
@pytest.mark.parametrize("p", [SIDE - 1, SIDE + 1])
def test_eigenvectors(p, lead, one_thread):
    m = matrices(p, *lead)
    lower = m.tril() + torch.randn_like(m).triu(1)  # of which the lower half counts, as torch has it
    values, vectors = lapack.eigh(lower)
    expected, _ = torch.linalg.eigh(m)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vectors @ values.diag_embed() @ vectors.mT, m, rtol=1e-11, atol=1e-11)
    eye = torch.eye(p, dtype=torch.float64).expand(*lead, p, p)
    torch.testing.assert_close(vectors.mT @ vectors, eye, rtol=1e-12, atol=1e-12)


def test_what_is_left_to_torch(one_thread, monkeypatch):
    """Gradients, small matrices, more threads."""
    taken = []
    before = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: taken.append(len(x)) or before(x))
    m = matrices(SIDE)
    lapack.eigh(m)
    assert taken == []
    values, _ = linalg.eigh(m.requires_grad_())
    values.sum().backward()
    torch.testing.assert_close(m.grad, torch.eye(SIDE, dtype=torch.float64))
    lapack.eigh(matrices(SIDE - 1))
    torch.set_num_threads(2)
    lapack.eigh(matrices(SIDE))
    assert taken == [SIDE, SIDE - 1, SIDE]


def test_without_what_holds_scipy_to_its_threads(one_thread, monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    lapack._libraries.cache_clear()
    try:
        m = matrices(SIDE)
        monkeypatch.setattr("numpy.linalg.eigh", None)
        torch.testing.assert_close(lapack.eigh(m)[0], torch.linalg.eigvalsh(m))
    finally:
        lapack._libraries.cache_clear()


def test_no_convergence_is_tried_again(one_thread, monkeypatch):
    m, before, calls = matrices(SIDE), np.linalg.eigh, []

    def fails(x):
        calls.append(1)
        if len(calls) == 1:
            raise np.linalg.LinAlgError("Eigenvalues did not converge")
        return before(x)

    monkeypatch.setattr(np.linalg, "eigh", fails)
    with pytest.raises(RuntimeError, match="side 256 did not converge"):
        lapack.eigh(m)
    calls.clear()
    torch.testing.assert_close(linalg.eigh(m)[0], torch.linalg.eigvalsh(m))
    assert len(calls) == 2


@pytest.mark.parametrize(("others", "taken"), [(["openblas"], True), (["openblas", "mkl"], False), ([], False)])
def test_only_where_all_of_it_is_openblas(others, taken, monkeypatch):
    class Found:
        def select(self, **which):
            return self

        def info(self):
            return [{"internal_api": name} for name in others]

    monkeypatch.setattr("threadpoolctl.ThreadpoolController", Found)
    lapack._libraries.cache_clear()
    try:
        assert (lapack._libraries() is not None) == taken
    finally:
        lapack._libraries.cache_clear()


def test_libraries_take_as_many_threads_as_they_are_told():
    from threadpoolctl import threadpool_info

    def held():
        return [x["num_threads"] for x in threadpool_info() if x["internal_api"] == "openblas"]

    before = held()
    with lapack.threads(1):
        assert set(held()) <= {1}
    assert held() == before
