"""Operations on matrices, kernels and vectors say what their names say, and change nothing that is there."""

import pickle

import pytest
import reference
import torch
from cases import PARAMETER_SPACE, STORED, build, representation
from torch import nn
from torch.nn import functional as F

import nngeom as nng

f64 = torch.float64


def test_operations_of_dense_kernels():
    case = build("mlp")
    k = nng.GramMatrix(case.model, case.loader)
    dense, f = k.to_dense(), nng.FVector(torch.randn(3, case.n, dtype=f64))
    torch.testing.assert_close(k.trace(), dense.trace())
    torch.testing.assert_close(k.mv(f).flat(), dense @ f.flat())
    torch.testing.assert_close((k + 2 * k - k).to_dense(), 2 * dense)


def test_the_eigenvalue_corrected_optimizer_moves_along_the_solve():
    case = build("mlp")
    optimizer = nng.optim.EKFAC(
        case.model, lr=1.0, momentum=0.0, kl_clip=None, damping=0.1, basis_every=1, scalings="batch"
    )
    before = nng.PVector.from_model(case.model)
    fisher = nng.EmpiricalFIM(case.model, [(case.inputs, case.targets)], nng.PMatEKFAC, loss="cross_entropy")
    with optimizer.observe():
        F.cross_entropy(case.model(case.inputs), case.targets).backward()
    gradient = nng.PVector.from_grad(case.model)
    optimizer.step()
    step = before - nng.PVector.from_model(case.model)
    torch.testing.assert_close(step.flat(), fisher.solve(gradient, 0.1).flat())
    assert step.dot(gradient) / (step.norm() * gradient.norm()) < 0.999


def test_low_rank_solve_off_its_range():
    case = build("mlp")
    m, f = nng.FIM(case.model, case.loader, nng.PMatLowRank), reference.fisher(case.model, case.inputs)
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    want = torch.linalg.solve(f + 0.3 * torch.eye(len(f), dtype=f64), v.flat())
    torch.testing.assert_close(m.solve(v, 0.3).flat(), want)


def test_norm_of_a_negative_matrix():
    m = nng.FIM(build("mlp").model, build("mlp").loader, nng.PMatEKFAC)
    torch.testing.assert_close((-1 * m).norm(), m.norm())


@pytest.fixture
def pair():
    """A dense and a diagonal matrix, and the same as tensors."""
    case = build("mlp")
    a, b = (nng.FIM(case.model, case.loader, r) for r in (nng.PMatDense, nng.PMatDiag))
    return a, b, a.to_dense(), b.to_dense()


def solved(dense, damping, v):
    return torch.linalg.solve(dense + damping * torch.eye(len(dense), dtype=f64), v.flat())


def test_sums_of_different_kinds(pair):
    a, b, da, db = pair
    torch.testing.assert_close((a + b).to_dense(), da + db)
    torch.testing.assert_close((b - a).to_dense(), db - da)


def test_numbers_of_a_scaled_sum(pair):
    a, b, da, db = pair
    total, dense = 2 * (a + b), 2 * (da + db)
    torch.testing.assert_close(total.trace(), dense.trace())
    torch.testing.assert_close(total.diag().flat(), dense.diagonal())
    torch.testing.assert_close(total.norm(), dense.norm())


def test_solves_with_a_scaled_sum(pair):
    a, b, da, db = pair
    v = nng.PVector.randn(a.layer_collection, dtype=f64)
    torch.testing.assert_close((2 * (a + b)).solve(v, 0.1).flat(), solved(2 * (da + db), 0.1, v))


def test_products_of_different_kinds(pair):
    a, b, da, db = pair
    v = nng.PVector.randn(a.layer_collection, dtype=f64)
    torch.testing.assert_close((b @ a).to_dense(), db @ da)
    torch.testing.assert_close((b @ a).solve(v, 0.2).flat(), solved(db @ da, 0.2, v))


def test_a_multiple_leaves_the_matrix_as_it_was():
    case = build("mlp")
    m = nng.FIM(case.model, case.loader, nng.PMatDense)
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    before = m.solve(v, 0.1).flat()
    torch.testing.assert_close((2 * m).solve(v, 0.2).flat(), before / 2)
    assert torch.equal(m.solve(v, 0.1).flat(), before)


@pytest.mark.parametrize("kind", PARAMETER_SPACE)
def test_matrices_are_frozen(kind):
    case = build("mlp")
    m = nng.FIM(case.model, case.loader, representation(kind, case.model))
    with pytest.raises(AttributeError):
        m.examples = 3


def test_multiples_and_inverses_of_ekfac_outlive_a_rescaling():
    case = build("mlp")
    ekfac = nng.FIM(case.model, case.loader, nng.PMatEKFAC)
    v = nng.PVector.randn(ekfac.layer_collection, dtype=f64)
    inverse = ekfac.inverse(0.1)
    again = ekfac.rescaled(case.model, case.loader)
    torch.testing.assert_close(again.to_dense(), ekfac.to_dense())
    torch.testing.assert_close(inverse.mv(v).flat(), ekfac.solve(v, 0.1).flat())
    torch.testing.assert_close((3 * ekfac).mv(v).flat(), 3 * ekfac.mv(v).flat())


def test_indefinite_matrices_keep_their_sign():
    case = build("mlp")
    a, b = (nng.FIM(case.model, [x], nng.PMatDense) for x, _ in case.loader)
    difference = a - b
    values, basis = difference.eigh()
    u = basis.to_dense()
    assert values.min() < 0
    torch.testing.assert_close(u @ values.diag() @ u.T, difference.to_dense())


def test_norms_of_vectors():
    lc = nng.LayerCollection.from_model(build("mlp").model)
    v = nng.PVector.randn(lc, dtype=f64)
    for p in (1, 2, 3, float("inf")):
        torch.testing.assert_close(v.norm(p), torch.linalg.vector_norm(v.flat(), p))


@pytest.fixture
def collections():
    """All parameters of a model, some, and all in the other order."""
    model = build("mlp").model
    whole = nng.LayerCollection.from_model(model)
    turned = nng.LayerCollection(whole.names[::-1], whole.shapes[::-1], whole.layers[::-1])
    return whole, nng.LayerCollection.from_model(model, include="0"), turned


def test_collections_differ_by_order_and_content(collections):
    whole, part, turned = collections
    assert whole != part and whole != turned and whole != None  # noqa: E711
    assert hash(whole) == hash(nng.LayerCollection.from_model(build("mlp").model))


def test_vectors_of_another_collection_are_refused_by_a_matrix(collections):
    whole, part, _ = collections
    case = build("mlp")
    m = nng.FIM(case.model, case.loader, nng.PMatKFAC, layer_collection=part)
    with pytest.raises(nng.CollectionError, match="another collection"):
        m.mv(nng.PVector.randn(whole, dtype=f64))


def test_vectors_of_different_collections_are_not_added(collections):
    whole, part, turned = collections
    with pytest.raises(nng.CollectionError, match="order"):
        nng.PVector.randn(whole) + nng.PVector.randn(turned)
    with pytest.raises(nng.CollectionError):
        nng.PVector.randn(part) + nng.PVector.randn(whole)


@pytest.mark.parametrize("model", [nn.Linear(3, 1, bias=False), nn.Linear(4, 5)], ids=["one parameter", "several"])
def test_vectors_are_copies(model):
    before = model.weight.detach().clone()
    nng.PVector.from_model(model).flat().add_(1)
    assert torch.equal(model.weight, before)


def test_unconverged_solves_raise():
    case = build("mlp")
    m = nng.FIM(case.model, case.loader, nng.PMatImplicit)
    with pytest.raises(nng.ConvergenceError, match="residual"):
        m.solve(nng.PVector.randn(m.layer_collection, dtype=f64), 1e-6, max_steps=1)


@pytest.mark.parametrize("kind", STORED)
def test_every_matrix_pickles(kind):
    case = build("conv2d")
    m = nng.FIM(case.model, case.loader, representation(kind, case.model))
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    assert torch.equal(pickle.loads(pickle.dumps(m)).solve(v, 10.0).flat(), m.solve(v, 10.0).flat())
