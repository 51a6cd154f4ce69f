"""The maps between parameter and function space: dense and implicit, adjoint to each other, first-order right."""

import pickle
import warnings

import pytest
import reference
import torch
from cases import CASES, build

import nngeom as nng


@pytest.fixture(params=CASES, scope="module")
def case(request):
    torch.set_num_threads(1)
    c = build(request.param)
    c.__dict__["jacobian"] = reference.jacobian(c.model, c.inputs)
    return c


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def test_dense_and_implicit(case):
    """AC-1 1.9: dense = implicit = autograd, and <J v, u> = <v, J^T u>."""
    lc = nng.LayerCollection.from_model(case.model)
    v = nng.PVector.randn(lc, 2, dtype=torch.float64)
    u = nng.FVector(torch.randn(2, 3, case.n, dtype=torch.float64))
    for push, pull in ((nng.PushForwardDense, nng.PullBackDense), (nng.PushForwardImplicit, nng.PullBackImplicit)):
        j = nng.Jacobian(case.model, case.loader, push)
        assert tuple(j.shape) == tuple(case.jacobian.shape) and isinstance(j.T, pull) and isinstance(j.T.T, push)
        close(j.mv(v).tensor, torch.einsum("knd,bd->bkn", case.jacobian, v.flat()))
        close(j.T.mv(u).flat(), torch.einsum("knd,bkn->bd", case.jacobian, u.tensor))
        close((j @ v).dot(u), v.dot(j.T @ u))
        close((j @ j.T).to_dense(), torch.einsum("knd,lmd->knlm", case.jacobian, case.jacobian).reshape(3 * case.n, -1))
        m = j.T @ j
        truth = torch.einsum("knd,kne->de", case.jacobian, case.jacobian)
        close(m.mv(v).flat(), v.flat() @ truth)
        close(m.trace(), truth.trace())
        close(m.materialize().to_dense(), truth)
        close((2 * m).materialize(nng.PMatDiag).diag().flat(), 2 * truth.diagonal())
        close(m.materialize(nng.PMatLowRank).to_dense(), truth)
        close(
            nng.Jacobian(case.model, case.loader, pull).mv(u).flat(),
            torch.einsum("knd,bkn->bd", case.jacobian, u.tensor),
        )


def test_chunks_and_budget(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nng.MemoryWarning)
        j = nng.Jacobian(case.model, case.loader, memory_budget=1000)
    close(j.tensor, case.jacobian, 1e-10)


def test_first_order(case):
    """Halving the step quarters the residual of the linearisation, where the model is smooth."""
    if any(isinstance(m, torch.nn.ReLU) for m in case.model.modules()) or "Residual" in type(case.model).__name__:
        pytest.skip("kinks")
    if any(getattr(m, "padding_idx", None) is not None for m in case.model.modules()):
        pytest.skip("a row of the table has no gradient by convention")
    j = nng.Jacobian(case.model, case.loader)
    v = nng.PVector.randn(j.layer_collection, dtype=torch.float64)
    f0, residual = case.model(case.inputs).detach(), []
    for step in (2e-3, 1e-3):
        v.add_to(case.model, step)
        residual.append(float((case.model(case.inputs).detach() - f0 - step * j.mv(v).tensor.T).norm()))
        v.add_to(case.model, -step)
    assert residual[0] < 1e-9 or 3.0 < residual[0] / residual[1] < 5.5


def test_matrices_act_on_all_rows():
    c = build("mlp")
    j = nng.Jacobian(c.model, c.loader)
    f = nng.FIM(c.model, c.loader, nng.PMatDense)
    dense = f.to_dense()
    close((f @ j).tensor, j.tensor @ dense)
    close((j @ f).tensor, j.tensor @ dense)
    solved = f.solve(j, 0.1)
    close(
        solved.tensor,
        torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=dense.dtype), j.tensor.flatten(0, 1).T).T.view(
            j.tensor.shape
        ),
    )
    close((j @ solved.T).tensor, torch.einsum("knd,lmd->knlm", j.tensor, solved.tensor))
    assert torch.equal(pickle.loads(pickle.dumps(j)).tensor, j.tensor) and j.to(torch.float32).dtype == torch.float32


def test_errors():
    c = build("mlp")
    j = nng.Jacobian(c.model, c.loader)
    with pytest.raises(nng.ArgumentTypeError, match="PVector"):
        j.mv(torch.zeros(3))
    with pytest.raises(nng.ArgumentError, match="FVector"):
        j.T.mv(nng.FVector(torch.zeros(3, c.n + 1)))
    with pytest.raises(nng.CollectionError):
        j.mv(nng.PVector.from_model(build("conv1d").model))
    with pytest.raises(nng.ArgumentTypeError, match="PushForwardDense"):
        nng.Jacobian(c.model, c.loader, nng.FMatDense)
    with pytest.raises(nng.UnsupportedError, match="materialize"):
        pickle.dumps(nng.Jacobian(c.model, c.loader, nng.PushForwardImplicit))
