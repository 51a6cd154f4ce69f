"""Kernels in a metric, ``J M J'^T``: every stored matrix on the zoo against dense rows, and what is refused."""

import pytest
import reference
import torch
from cases import CASES, STORED, build, representation
from torch.nn import functional as F

import nngeom as nng

FEW = ["mlp", "conv2d", "embedding", "tied", "layer-norm", "gru"]


def close(x, y, tol=1e-10):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def inverse(case, kind, factored=False):
    """A damped inverse of the Fisher matrix; of the arrow matrix, which may be indefinite, one that exists."""
    f = nng.FIM(case.model, case.loader, representation(kind, case.model))
    if kind == "quasi-diag":
        return f.inverse(1 + 3 * float(f.diag().flat().max()))
    return f.inverse(nng.FactoredTikhonov(0.3) if factored else 0.3)


def sandwich(j, m, other=None):
    return torch.einsum("knd,de,lme->knlm", j, m.to_dense(), j if other is None else other)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("name", CASES)
def test_every_matrix_between_rows(name, kind):
    case = build(name)
    m, j = inverse(case, kind), reference.jacobian(case.model, case.inputs)
    expected = sandwich(j, m)
    kernel = nng.GramMatrix(case.model, case.loader, metric=m).tensor
    close(kernel, expected)
    assert torch.equal(kernel, kernel.permute(2, 3, 0, 1))
    close(nng.GramMatrix(case.model, case.loader, nng.FMatDiag, metric=m).tensor, torch.einsum("knkn->kn", expected))


@pytest.mark.parametrize("kind", ["dense", "diag", "quasi-diag", "kfac", "ekfac", "mixed"])
@pytest.mark.parametrize("name", FEW)
def test_what_any_kernel_can(name, kind):
    """Blocks, another set, centred, cut to a budget, of a loss: as without a metric."""
    case, other = build(name), build(name, sizes=(2, 1))
    m, j = inverse(case, kind), reference.jacobian(case.model, case.inputs)
    q = reference.jacobian(case.model, other.inputs)
    whole, args = sandwich(j, m), (case.model, case.loader)
    close(nng.GramMatrix(*args, nng.FMatBlockDiag, metric=m).tensor, torch.einsum("knkm->knm", whole))
    close(nng.GramMatrix(*args, metric=m, other=other.loader).tensor, sandwich(j, m, q))
    close(nng.GramMatrix(*args, metric=m, memory_budget=20_000).tensor, whole)
    mean = j.mean(1, keepdim=True)
    centred = sandwich(j - mean, m)
    close(nng.GramMatrix(*args, metric=m, centered=True).tensor, centred)
    norms = nng.GramMatrix(*args, nng.FMatDiag, metric=m, centered=True).tensor
    close(norms, torch.einsum("knkn->kn", centred))
    shifted = nng.GramMatrix(*args, metric=m, centered=True, other=other.loader).tensor
    close(shifted, sandwich(j - mean, m, q - mean))
    if case.model(case.inputs).ndim == 2:
        g = reference.loss_gradients(case.model, case.inputs, case.targets, F.cross_entropy)[None]
        close(nng.GramMatrix(*args, metric=m, loss="cross_entropy").tensor, sandwich(g, m))


@pytest.mark.parametrize("name", FEW)
def test_factored_damping_keeps_rows_factored(name):
    case = build(name)
    m, j = inverse(case, "kfac", factored=True), reference.jacobian(case.model, case.inputs)
    close(nng.GramMatrix(case.model, case.loader, metric=m).tensor, sandwich(j, m))
    norms = nng.GramMatrix(case.model, case.loader, nng.FMatDiag, metric=m).tensor
    close(norms, torch.einsum("knkn->kn", sandwich(j, m)))


@pytest.mark.parametrize("kind", ["diag", "block-diag", "kfac", "ekfac", "eye"])
def test_layers_sum_to_the_whole(kind):
    case = build("conv2d")
    m = inverse(case, kind)
    whole = nng.GramMatrix(case.model, case.loader, metric=m).tensor
    layers = nng.GramMatrices(case.model, case.loader, metric=m)
    close(sum(k.tensor for k in layers.values()), whole)
    loss = nng.GramMatrices(case.model, case.loader, metric=m, loss="mse", function=lambda x, y: case.model(x)[:, :1])
    assert all(k.tensor.shape == (1, case.n, 1, case.n) for k in loss.values())


def test_the_identity_is_no_metric():
    case = build("mlp")
    plain = nng.GramMatrix(case.model, case.loader).tensor
    eye = nng.PMatEye.build(nng.LayerCollection.from_model(case.model), dtype=torch.float64)
    close(nng.GramMatrix(case.model, case.loader, metric=eye).tensor, plain, 1e-14)
    g = reference.loss_gradients(case.model, case.inputs, case.targets, F.cross_entropy)
    close(nng.GramMatrix(case.model, case.loader, loss="cross_entropy").tensor[0, :, 0], g @ g.T)


def test_operators_and_parts_of_the_parameters():
    case = build("mlp")
    lc = nng.LayerCollection.from_model(case.model, include="2.*")
    f = nng.FIM(case.model, case.loader, nng.PMatDense, layer_collection=lc)
    j = reference.jacobian(case.model, case.inputs)[..., -lc.numel :]
    close(nng.GramMatrix(case.model, case.loader, metric=f).tensor, sandwich(j, f))
    products = nng.FIM(case.model, case.loader, nng.PMatImplicit, layer_collection=lc)
    close(nng.GramMatrix(case.model, case.loader, metric=products).tensor, sandwich(j, f))
    diag = nng.FIM(case.model, case.loader, nng.PMatDiag, layer_collection=lc)
    lazy = f + diag
    close(nng.GramMatrix(case.model, case.loader, metric=lazy).tensor, sandwich(j, lazy))
    with pytest.raises(nng.StructureError, match="not symmetric"):
        nng.GramMatrix(case.model, case.loader, metric=f @ diag)


def test_gradients_reach_the_parameters():
    case = build("mlp")
    m = inverse(case, "ekfac")
    p = list(case.model.parameters())
    trace = nng.GramMatrix(case.model, case.loader, metric=m, differentiable=True).trace()
    found = torch.autograd.grad(trace, p, materialize_grads=True, allow_unused=True)
    f = lambda *w: torch.func.functional_call(
        case.model, dict(zip(dict(case.model.named_parameters()), w)), case.inputs
    )
    rows = torch.autograd.functional.jacobian(f, tuple(p), create_graph=True)
    j = torch.cat([r.flatten(2) for r in rows], 2)
    trace = torch.einsum("nkd,de,nke->", j, m.to_dense(), j)
    expected = torch.autograd.grad(trace, p, materialize_grads=True, allow_unused=True)
    for x, y in zip(found, expected):
        close(x, y)


def test_wider_metrics_and_narrower_models():
    case = build("mlp", torch.float32)
    m = inverse(build("mlp"), "ekfac")
    kernel = nng.GramMatrix(case.model, case.loader, metric=m)
    j = reference.jacobian(build("mlp").model, build("mlp").inputs)
    torch.testing.assert_close(kernel.tensor.double(), sandwich(j, m), rtol=1e-4, atol=1e-4)


def test_files_know_their_metric(tmp_path):
    case = build("mlp")
    f = nng.FIM(case.model, case.loader, nng.PMatEKFAC)
    args, path = (case.model, case.loader), tmp_path / "k.npy"
    first = nng.GramMatrix(*args, metric=f.inverse(0.1), loss="cross_entropy", out=path).tensor.clone()
    assert torch.equal(nng.GramMatrix(*args, metric=f.inverse(0.1), loss="cross_entropy", out=path).tensor, first)
    close(first, nng.GramMatrix(*args, metric=f.inverse(0.1), loss="cross_entropy").tensor)
    with pytest.raises(nng.ArgumentError, match="metric"):
        nng.GramMatrix(*args, metric=f.inverse(0.2), loss="cross_entropy", out=path)
    with pytest.raises(nng.ArgumentError, match="the loss"):
        nng.GramMatrix(*args, metric=f.inverse(0.1), loss=lambda o, y: o.square().sum(1), out=path)
    with pytest.raises(nng.ArgumentError, match="holds nothing"):
        nng.GramMatrix(*args, metric=nng.FIM(*args, nng.PMatImplicit), out=path)


def test_what_is_refused():
    case, other = build("mlp"), build("conv2d")
    f = nng.FIM(case.model, case.loader, nng.PMatEKFAC)
    args = (case.model, case.loader)
    with pytest.raises(nng.ArgumentTypeError, match="metric is PMatEKFAC; expected a matrix"):
        nng.GramMatrix(*args, metric=nng.PMatEKFAC)
    with pytest.raises(nng.CollectionError):
        nng.GramMatrix(other.model, other.loader, metric=f)
    with pytest.raises(nng.CollectionError):
        lc = nng.LayerCollection.from_model(case.model, include="0.*")
        nng.GramMatrix(*args, metric=f, layer_collection=lc)
    with pytest.raises(nng.ArgumentError, match="FMatImplicit"):
        nng.GramMatrix(*args, nng.FMatImplicit, metric=f)
    with pytest.raises(nng.ArgumentError, match="estimator"):
        nng.GramMatrix(*args, loss="cross_entropy", estimator="rademacher")
    with pytest.raises(nng.StructureError, match="between layers"):
        nng.GramMatrices(*args, metric=nng.FIM(*args, nng.PMatDense))
    with pytest.raises(nng.LoaderError, match="targets"):
        nng.GramMatrix(case.model, case.inputs, loss="cross_entropy", metric=f)
