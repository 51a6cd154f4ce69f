"""Sums and multiples of Jacobians, their entries, and what matrices and kernels make of them."""

import functools

import pytest
import reference
import torch
from cases import MAPS, STORED, STORED_KERNELS, build, representation

import nngeom as nng

f64 = torch.float64
MODELS = ("mlp", "conv2d", "layer-norm", "language-model", "tied")


@functools.cache
def truth(name):
    torch.set_num_threads(1)
    case = build(name)
    return case, reference.jacobian(case.model, case.inputs)


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def entries(j):
    return (j if hasattr(j, "tensor") else j.materialize()).tensor


@pytest.fixture(params=[(a, b) for a in MAPS for b in MAPS], ids="+".join)
def kinds(request):
    return request.param


@pytest.mark.parametrize("name", MODELS)
def test_sums(name, kinds):
    case, j = truth(name)
    a, b = (nng.Jacobian(case.model, case.loader, MAPS[kind][0]) for kind in kinds)
    total, dense = a / 2 + 3 * b - (-a), 4.5 * j
    v = nng.PVector.randn(a.layer_collection, 2, dtype=f64)
    u = nng.FVector(torch.randn(2, *j.shape[:2], dtype=f64))
    assert tuple(total.shape) == tuple(j.shape)
    close(total.mv(v).tensor, torch.einsum("knd,bd->bkn", dense, v.flat()))
    close((total @ v).tensor, torch.einsum("knd,bd->bkn", dense, v.flat()))
    close(total.T.mv(u).flat(), torch.einsum("knd,bkn->bd", dense, u.tensor))
    close(entries(total), dense)
    close(total.norm(), dense.norm())
    close(sum([a, b]).norm(), 2 * j.norm())
    flat = dense.flatten(0, 1)
    if kinds[0] == kinds[1]:
        close((total @ total.T).to_dense(), flat @ flat.T)
        close((total.T @ total).mv(v).flat(), v.flat() @ flat.T @ flat)
        close((total.T @ total).trace(), flat.square().sum())


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("name", MODELS)
def test_entries_and_forms(name, kind):
    case, dense = truth(name)
    push, pull = (nng.Jacobian(case.model, case.loader, cls) for cls in MAPS[kind])
    for j in (push, pull, 2 * push - push):
        close(j.norm(), dense.norm())
        at = 0
        for parameter, shape in zip(j.layer_collection.names, j.layer_collection.shapes):
            size = torch.Size(shape).numel()
            assert j[parameter].shape == (*dense.shape[:2], *shape)
            torch.testing.assert_close(j[parameter].reshape(*dense.shape[:2], size), dense[..., at : at + size])
            at += size
        with pytest.raises(nng.CollectionError, match="no parameter 'nothing'"):
            j["nothing"]
    for stored in STORED:
        m = nng.FIM(case.model, case.loader, representation(stored, case.model))
        expected = torch.einsum("knd,de,kne->kn", dense, m.to_dense(), dense)
        close(m.vTMv(push), expected)
        close((m + m).vTMv(push + push), 8 * expected)


@pytest.mark.parametrize("kind", [*STORED_KERNELS, "implicit", "sum"])
@pytest.mark.parametrize("name", MODELS[:3])
def test_kernels_act_on_columns(name, kind):
    case, jacobian = truth(name)
    if kind == "sum":
        k = sum(nng.GramMatrix(case.model, case.loader, r) for r in (nng.FMatImplicit, nng.FMatDiag))
    else:
        k = nng.GramMatrix(case.model, case.loader, STORED_KERNELS.get(kind, nng.FMatImplicit))
    j, k2 = nng.Jacobian(case.model, case.loader), nng.GramMatrix(case.model, case.loader)
    dense, rows, tol = k.to_dense(), jacobian.flatten(0, 1), 1e-4 if kind == "implicit" else 1e-8
    damped = dense + 0.5 * torch.eye(len(dense), dtype=f64)
    close((k @ j).tensor.flatten(0, 1), dense @ rows)
    solved = k.solve(j, 0.5)
    assert type(solved) is nng.PushForwardDense
    close(solved.tensor.flatten(0, 1), torch.linalg.solve(damped, rows), tol)
    for other in (k2, nng.GramMatrix(case.model, case.loader, nng.FMatDiag)):
        close(k.solve(other, 0.5).to_dense(), torch.linalg.solve(damped, other.to_dense()), tol)
    inverse = k.inverse(0.5)
    close(inverse.to_dense(), torch.linalg.inv(damped))
    assert kind not in STORED_KERNELS or type(inverse) is type(k)


def test_rectangular_kernels_are_solved_with():
    case, jacobian = truth("mlp")
    k = nng.GramMatrix(case.model, case.loader)
    cross = nng.GramMatrix(case.model, case.loader, other=[(case.inputs[:2], case.targets[:2])])
    damped = k.to_dense() + 0.5 * torch.eye(k.shape[0], dtype=f64)
    solved = k.solve(cross, 0.5)
    assert solved.shape == cross.shape
    close(solved.to_dense(), torch.linalg.solve(damped, cross.to_dense()))
    cut = nng.Cutoff(1e-3)
    values, u = torch.linalg.eigh(k.to_dense())
    pseudo = (u * torch.where(values >= 1e-3, 1 / values, torch.zeros_like(values))) @ u.T
    close(k.inverse(cut).to_dense(), pseudo, 1e-7)
    close(k.solve(cross, cut).to_dense(), pseudo @ cross.to_dense(), 1e-7)
    for call in (lambda: cross.inverse(0.5), lambda: cross.solve(k, 0.5)):
        with pytest.raises(nng.ArgumentError, match="square"):
            call()


def test_errors():
    case, _ = truth("mlp")
    j, other = nng.Jacobian(case.model, case.loader), build("conv2d")
    with pytest.raises(nng.ArgumentTypeError, match="cannot add PullBackDense to a push-forward"):
        j + j.T
    with pytest.raises(nng.ArgumentTypeError, match="cannot add int"):
        j - 1
    with pytest.raises(nng.CollectionError):
        j + nng.Jacobian(other.model, other.loader)
    with pytest.raises(nng.ArgumentError, match="do not add"):
        j + nng.Jacobian(case.model, case.loader[:1])
    with pytest.raises(nng.ArgumentTypeError, match="cannot scale"):
        j * torch.ones(3)
    k = nng.GramMatrix(case.model, case.loader[:1])
    with pytest.raises(nng.ArgumentError, match="shape"):
        k @ j
    with pytest.raises(nng.ArgumentError, match="shape"):
        k.solve(j, 0.1)
    with pytest.raises(nng.SingularError):
        (-1.0 * k).inverse(0.1)
    implicit = nng.Jacobian(case.model, case.loader, nng.PushForwardImplicit)
    m = nng.FIM(case.model, case.loader)
    for back in (j.T, implicit.T, (implicit + j).T):
        with pytest.raises(nng.ArgumentTypeError, match="operand is"):
            m.vTMv(back)
    with pytest.raises(nng.CollectionError):
        m.vTMv(nng.Jacobian(other.model, other.loader))


def test_products_of_maps_of_unlike_kinds():
    """Every pair of a transpose and a map, both ways round, against the rows."""
    case = build("mlp")
    dense, implicit = (
        nng.Jacobian(case.model, case.loader, kind) for kind in (nng.PushForwardDense, nng.PushForwardImplicit)
    )
    kernel = nng.GramMatrix(case.model, case.loader)
    maps = [dense, implicit, kernel @ implicit, dense + implicit]
    rows = [m.materialize().rows() for m in maps]
    for x, a in zip(maps, rows):
        for y, b in zip(maps, rows):
            expected = a.T @ b
            torch.testing.assert_close(
                (x.T @ y).to_dense(), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item()
            )
            torch.testing.assert_close((x.T @ y).trace(), expected.trace(), rtol=1e-9, atol=0)
            outer = (x @ y.T).to_dense()
            torch.testing.assert_close(outer, a @ b.T, rtol=1e-9, atol=1e-9 * outer.abs().max().item())
