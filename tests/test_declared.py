"""Operations that every matrix and kernel declares, of lazy ones: moving, materialising, solving for many rows."""

import pytest
import torch
from small import model_of, normal
from torch import nn

import nngeom as nng


def close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return model_of(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), [(normal(6, 3),), (normal(3, 3),)]


@pytest.fixture
def j(net):
    return nng.Jacobian(*net)


def test_a_pull_push_moves(j):
    m = 2 * (j.T @ j)
    moved = m.to(torch.float32)
    assert moved.dtype == torch.float32 and moved.symmetric and moved.left.tensor is moved.right.tensor
    torch.testing.assert_close(moved.to_dense(), m.to_dense().float())
    back = m.to(torch.float64)
    close(back.to_dense(), 2 * j.rows().T @ j.rows())


def test_a_pull_push_of_two_maps_moves(net, j):
    other = nng.Jacobian(net[0], [(normal(9, 3),)])
    m = j.T @ other
    assert not m.symmetric and not m.to(torch.float32).symmetric
    torch.testing.assert_close(m.to(torch.float32).to_dense(), m.to_dense().float(), rtol=1e-4, atol=1e-4)


def test_a_pull_push_is_measured_in_any_representation(j):
    dense = j.rows().T @ j.rows()
    m = j.T @ j
    close(m.measured(nng.PMatDiag).diag().flat(), dense.diagonal())
    close((3 * m).measured(nng.PMatDense).to_dense(), 3 * dense)
    close(m.measured(nng.PMatMixed({"0": nng.PMatDense}, default=nng.PMatDiag)).trace(), dense.trace())
    close(m.materialize(nng.PMatDiag).diag().flat(), dense.diagonal())
    assert isinstance(m.materialize(), nng.PMatDense)
    close(m.materialize(limit=len(dense)).to_dense(), dense)


def test_a_pull_push_is_not_materialised_above_the_limit(net, j):
    for m in (j.T @ j, (lambda j: j.T @ j)(nng.Jacobian(*net, nng.PushForwardImplicit))):
        with pytest.raises(nng.SizeError, match="limit is 7 parameters"):
            m.materialize(limit=7)
        with pytest.raises(nng.ArgumentTypeError, match="representation is 'diag'"):
            m.measured("diag")
    with pytest.raises(nng.ArgumentError, match="no option"):
        (j.T @ j).measured(nng.PMatDiag, sharing="reduce")


def test_a_pull_push_that_is_not_symmetric_is_not_measured(net, j):
    m = j.T @ nng.Jacobian(net[0], [(normal(9, 3),)])
    with pytest.raises(nng.UnsupportedError, match=r"not symmetric; to_dense\(\)"):
        m.measured(nng.PMatDiag)
    with pytest.raises(nng.UnsupportedError, match="not symmetric"):
        m.materialize()


def test_what_holds_a_model_does_not_move(net):
    implicit = nng.FIM(*net, nng.PMatImplicit)
    j = nng.Jacobian(*net, nng.PushForwardImplicit)
    kernel = nng.GramMatrix(*net, nng.FMatImplicit)
    for x in (implicit, implicit.inverse(0.1), j.T @ j, kernel, kernel + kernel, implicit + implicit):
        with pytest.raises(nng.UnsupportedError, match=r"model\.to"):
            x.to(torch.float32)


def test_a_sum_of_kernels_moves(net):
    class Named(nng.FMatDiag):
        """A kind that no other kind holds."""

        wider = None

    k, named = nng.GramMatrix(*net), nng.GramMatrix(*net, Named)
    total = named + nng.GramMatrix(*net, nng.FMatDiag)
    moved = total.to(torch.float32)
    assert type(moved) is type(total) and moved.dtype == torch.float32
    close(moved.diag().tensor, 2 * k.diag().tensor.float())


def test_a_product_solves_for_all_rows(net, j):
    x, y = nng.FIM(*net, nng.PMatDiag, likelihood="gaussian"), nng.FIM(*net, nng.PMatEye, likelihood="gaussian")
    m = 3 * (x @ y)
    expected = torch.linalg.solve(m.to_dense(), j.rows().T).T
    close(m.solve(j).rows(), expected)
    v = nng.PVector.randn(j.layer_collection, 4, dtype=torch.float64)
    close(m.solve(v).flat(), torch.linalg.solve(m.to_dense(), v.flat().T).T)
