"""The maps between parameter and function space: dense and implicit, adjoint to each other, first-order right."""

import functools
import pickle
import warnings

import pytest
import reference
import torch
from cases import CASES, MAPS, STORED, WHOLE, build

import nngeom as nng


@functools.cache
def truth(name):
    """A model of the zoo and its Jacobian ``(c, n, d)``."""
    torch.set_num_threads(1)
    case = build(name)
    return case, reference.jacobian(case.model, case.inputs)


@pytest.fixture(params=CASES, scope="module")
def exact(request):
    return truth(request.param)


@pytest.fixture(params=MAPS, scope="module")
def mapped(request, exact):
    """A map, the classes of it and of its adjoint, the case and the exact Jacobian."""
    case, jacobian = exact
    push, pull = MAPS[request.param]
    return nng.Jacobian(case.model, case.loader, push), (push, pull), case, jacobian


def vectors(j):
    """Two of the parameters, two of the outputs."""
    c, n, _ = j.shape
    u = nng.FVector(torch.randn(2, c, n, dtype=torch.float64))
    return nng.PVector.randn(j.layer_collection, 2, dtype=torch.float64), u


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def test_shape_and_adjoint(mapped):
    j, (push, pull), _, jacobian = mapped
    assert tuple(j.shape) == tuple(jacobian.shape) and isinstance(j.T, pull) and isinstance(j.T.T, push)


def test_pushed_forward(mapped):
    j, _, _, jacobian = mapped
    v, _ = vectors(j)
    close(j.mv(v).tensor, torch.einsum("knd,bd->bkn", jacobian, v.flat()))


def test_pulled_back(mapped):
    j, (_, pull), case, jacobian = mapped
    _, u = vectors(j)
    expected = torch.einsum("knd,bkn->bd", jacobian, u.tensor)
    close(j.T.mv(u).flat(), expected)
    close(nng.Jacobian(case.model, case.loader, pull).mv(u).flat(), expected)


def test_adjoint_to_each_other(mapped):
    """``<J v, u> = <v, J^T u>``."""
    j, _, _, _ = mapped
    v, u = vectors(j)
    close((j @ v).dot(u), v.dot(j.T @ u))


def test_push_times_pull_is_the_kernel(mapped):
    j, _, _, jacobian = mapped
    close((j @ j.T).to_dense(), torch.einsum("knd,lmd->knlm", jacobian, jacobian).flatten(2).flatten(0, 1))


def test_pull_times_push_is_a_matrix(mapped):
    j, _, _, jacobian = mapped
    truth, (v, _) = torch.einsum("knd,kne->de", jacobian, jacobian), vectors(j)
    m = j.T @ j
    close(m.mv(v).flat(), v.flat() @ truth)
    close(m.trace(), truth.trace())


@pytest.mark.parametrize("kind", [k for k in WHOLE if k in STORED])
def test_materialized_whole(mapped, kind):
    j, _, _, jacobian = mapped
    close((j.T @ j).materialize(STORED[kind]).to_dense(), torch.einsum("knd,kne->de", jacobian, jacobian))


def test_a_multiple_materialized(mapped):
    j, _, _, jacobian = mapped
    close((2 * (j.T @ j)).materialize(nng.PMatDiag).diag().flat(), 2 * jacobian.square().sum((0, 1)))


def test_chunks_and_budget(exact):
    case, jacobian = exact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nng.MemoryWarning)
        j = nng.Jacobian(case.model, case.loader, memory_budget=1000)
    close(j.tensor, jacobian, 1e-10)


def test_first_order(exact):
    """Halving the step quarters the residual of the linearisation, where the model is smooth."""
    case, _ = exact
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
