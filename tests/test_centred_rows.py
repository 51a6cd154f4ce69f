"""Matrices and maps of rows less their mean over examples, output by output, against loops over outputs."""

import functools

import pytest
import reference
import torch
from cases import MAPS, build, representation

import nngeom as nng

f64 = torch.float64
MODELS = ("mlp", "conv2d", "layer-norm", "tied")
OFFERED = ("dense", "diag", "block-diag", "low-rank", "quasi-diag", "implicit")


@functools.cache
def truth(name):
    torch.set_num_threads(1)
    case = build(name)
    return case, reference.jacobian(case.model, case.inputs)


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def moment(rows):
    """Of rows ``(k, n, d)``, each less its mean over examples."""
    centred = rows - rows.mean(1, keepdim=True)
    flat = centred.flatten(0, 1)
    return flat.T @ flat / rows.shape[1]


def scores(case, jacobian):
    """``sqrt(p_y)`` times the score of every class, ``(y, n, d)``."""
    with torch.no_grad():
        p = case.model(case.inputs).softmax(-1)  # [n c]
    mean = torch.einsum("nk,knd->nd", p, jacobian)
    return torch.stack([p[:, y].sqrt()[:, None] * (jacobian[y] - mean) for y in range(p.shape[1])])


def blocks_of(m, dense):
    """What a representation keeps of a dense matrix."""
    return m.to_dense(), torch.where(m.to_dense() != 0, dense, torch.zeros_like(dense))


@pytest.mark.parametrize("kind", OFFERED)
@pytest.mark.parametrize("name", MODELS)
def test_second_moments(name, kind):
    case, jacobian = truth(name)
    chosen = representation(kind, case.model)
    softmax, plain = moment(scores(case, jacobian)), moment(jacobian)
    inputs = [(x,) for x, *_ in case.loader]
    for m, dense in (
        (nng.FIM(case.model, case.loader, chosen, centered=True), softmax),
        (nng.GGN(case.model, case.loader, chosen, loss="cross_entropy", centered=True), softmax),
        (nng.FIM(case.model, inputs, chosen, likelihood="gaussian", centered=True), plain),
        (nng.FIM(case.model, inputs, chosen, likelihood="gaussian", centered=True, memory_budget=20_000), plain),
    ):
        close(m.trace(), dense.trace())
        if kind != "quasi-diag":
            close(*blocks_of(m, dense))
        else:
            close(m.diag().flat(), dense.diagonal())


@pytest.mark.parametrize("name", MODELS)
def test_implicit_products(name):
    case, jacobian = truth(name)
    dense = moment(scores(case, jacobian))
    m = nng.FIM(case.model, case.loader, nng.PMatImplicit, centered=True)
    v = nng.PVector.randn(m.layer_collection, 3, dtype=f64)
    close(m.mv(v).flat(), v.flat() @ dense)
    close(m.mv(v[0]).flat(), dense @ v[0].flat())
    close(m.diag().flat(), dense.diagonal())
    close(
        m.solve(v[0], 0.1).flat(), torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=f64), v[0].flat()), 1e-5
    )
    unit = torch.eye(len(dense), dtype=f64)
    for layer, block in m.by_layer().items():
        inside = nng.PVector.from_flat(m.layer_collection, unit)
        names = block.layer_collection.names
        place = torch.cat([inside[name].flatten(1).T for name in names]).argmax(1)
        close(block.to_dense(), dense[place][:, place])
        assert layer in m.layer_collection.by_layer()


def test_a_large_mean_cancels_before_any_square():
    """As for stored matrices: no digits are lost to it."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 2, dtype=f64), torch.randn(20, 3, dtype=f64)
    m = nng.FIM(model, [(x + 1e7,)], nng.PMatImplicit, likelihood="gaussian", centered=True)
    rows = reference.jacobian(model, x + 1e7)
    close(m.to_dense(), moment(rows), 1e-6)


@pytest.mark.parametrize("name", MODELS[:3])
def test_diagonals_in_eigenbases(name):
    case, jacobian = truth(name)
    m = nng.FIM(case.model, case.loader, nng.PMatEKFAC, centered=True)
    dense = moment(scores(case, jacobian))
    close(m.trace(), dense.trace())
    for layout, block in m.blocks.items():
        place = layout.indices().flatten()
        units = torch.eye(layout.numel, dtype=f64).view(-1, *layout.sizes)
        u = block.basis.mv(units).flatten(1)  # rows are eigenvectors
        close(block.d.flatten(), ((u @ dense[place][:, place]) * u).sum(1))


def test_a_loss_and_a_likelihood_of_ones_own_have_the_symmetric_root():
    case, jacobian = truth("mlp")

    def loss(outputs, targets):
        return (outputs[:, :1] * 0.5 + outputs).square().sum(1)

    class Skewed(nng.Likelihood):
        def square_root(self, outputs, targets=None):
            c = outputs.shape[1]
            half = torch.eye(c, dtype=outputs.dtype)
            half[:, 0] += 0.5
            return (2**0.5 * half)[:, None].expand(c, len(outputs), c)

    c = jacobian.shape[0]
    half = torch.eye(c, dtype=f64)
    half[:, 0] += 0.5
    values, u = torch.linalg.eigh(2 * half.T @ half)
    root = (u * values.sqrt()) @ u.T
    dense = moment(torch.einsum("kl,lnd->knd", root, jacobian))
    close(nng.GGN(case.model, case.loader, nng.PMatDense, loss=loss, centered=True).to_dense(), dense, 1e-7)
    close(nng.FIM(case.model, case.loader, nng.PMatDense, likelihood=Skewed(), centered=True).to_dense(), dense)


def test_large_means_cancel_before_any_square():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    x = 1e3 + torch.randn(50, 3)
    m = nng.FIM(model, [(x,)], nng.PMatDense, likelihood="gaussian", centered=True)
    wide = torch.cat([x.double(), torch.ones(50, 1, dtype=f64)], 1)
    centred = wide - wide.mean(0)
    expected = (centred.T @ centred / 50).diagonal()[:3]
    close(m.diag()["weight"][0].double(), expected, 1e-4)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("name", MODELS)
def test_maps(name, kind):
    case, jacobian = truth(name)
    centred = jacobian - jacobian.mean(1, keepdim=True)
    j = nng.Jacobian(case.model, case.loader, MAPS[kind][0], centered=True)
    back = nng.Jacobian(case.model, case.loader, MAPS[kind][1], centered=True)
    v = nng.PVector.randn(j.layer_collection, 2, dtype=f64)
    u = nng.FVector(torch.randn(2, *jacobian.shape[:2], dtype=f64))
    flat = centred.flatten(0, 1)
    close(j.mv(v).tensor.flatten(1), v.flat() @ flat.T)
    for transpose in (back, j.T):
        close(transpose.mv(u).flat(), u.tensor.flatten(1) @ flat)
    close((j if hasattr(j, "tensor") else j.materialize()).tensor, centred)
    close(j.norm(), centred.norm())
    close((j @ j.T).to_dense(), flat @ flat.T)
    plain = nng.Jacobian(case.model, case.loader, MAPS[kind][0])
    close((plain @ j.T).to_dense(), jacobian.flatten(0, 1) @ flat.T)
    close((j @ plain.T).to_dense(), flat @ jacobian.flatten(0, 1).T)
    kernel = nng.GramMatrix(case.model, case.loader, centered=True)
    close((j @ j.T).to_dense(), kernel.to_dense())


def test_errors():
    case, _ = truth("mlp")
    with pytest.raises(nng.UnsupportedError, match="PMatKFAC: centred rows"):
        nng.FIM(case.model, case.loader, centered=True)
    with pytest.raises(nng.ArgumentError, match="estimator"):
        nng.FIM(case.model, case.loader, nng.PMatDiag, centered=True, estimator="rademacher")
    with pytest.raises(nng.LoaderError):
        nng.FIM(case.model, [], nng.PMatDiag, centered=True)
    ragged = [(torch.randn(2, t, 4), torch.zeros(2, t, dtype=torch.long)) for t in (3, 5)]
    with pytest.raises(nng.OutputError, match="output by output"):
        nng.FIM(torch.nn.Linear(4, 3), ragged, nng.PMatDiag, likelihood=nng.Categorical(dim=-1), centered=True)
