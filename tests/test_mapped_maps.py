"""Kernels on Jacobians that are known by their products: ``K J`` and its transpose, against dense ones."""

import functools

import pytest
import reference
import torch
from cases import STORED_KERNELS, build

import nngeom as nng

f64 = torch.float64
MODELS = ("mlp", "conv2d", "language-model")


@functools.cache
def truth(name):
    torch.set_num_threads(1)
    case = build(name)
    return case, reference.jacobian(case.model, case.inputs)


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def require(map_, dense, tol=1e-9):
    """Every operation of a lazy map against its rows ``(c, n, d)``."""
    assert tuple(map_.shape) == tuple(dense.shape)
    lc, flat = map_.layer_collection, dense.flatten(0, 1)
    v = nng.PVector.randn(lc, 2, dtype=f64)
    u = nng.FVector(torch.randn(2, *dense.shape[:2], dtype=f64))
    close((map_ @ v).tensor.flatten(1), v.flat() @ flat.T, tol)
    close((map_.T @ u).flat(), u.tensor.flatten(1) @ flat, tol)
    close(map_.T.T.mv(v).tensor, map_.mv(v).tensor, tol)
    close(map_.materialize().tensor, dense, tol)
    close(map_.T.materialize().tensor, dense, tol)
    close(map_.norm(), dense.norm(), tol)
    name = lc.names[0]
    lo, shape = lc.offsets()[name]
    close(map_[name].flatten(2), dense[..., lo : lo + torch.Size(shape).numel()], tol)
    close((map_ / 2 + map_).materialize().tensor, 1.5 * dense, tol)


CASES = [(name, kind) for name in MODELS for kind in STORED_KERNELS] + [("mlp", "implicit")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_kernels_on_implicit_jacobians(name, kind):
    case, jacobian = truth(name)
    k = nng.GramMatrix(case.model, case.loader, STORED_KERNELS.get(kind, nng.FMatImplicit))
    j = nng.Jacobian(case.model, case.loader, nng.PushForwardImplicit)
    dense, rows = k.to_dense(), jacobian.flatten(0, 1)
    require(k @ j, (dense @ rows).view_as(jacobian))
    close((k @ (2 * j)).materialize().tensor, 2 * (dense @ rows).view_as(jacobian))
    if kind != "implicit":
        require(k @ (k @ j), (dense @ dense @ rows).view_as(jacobian))
    damped = dense + 0.5 * torch.eye(len(dense), dtype=f64)
    solved = torch.linalg.solve(damped, rows).view_as(jacobian)
    options = {"tol": 1e-12} if kind == "implicit" else {}
    close(k.solve(j, 0.5, **options).materialize().tensor, solved, 1e-7)
    close(((k @ j) @ j.T).to_dense(), dense @ rows @ rows.T)


def test_rectangular_kernels():
    case, jacobian = truth("mlp")
    few = [(case.inputs[:2], case.targets[:2])]
    cross = nng.GramMatrix(case.model, few, other=case.loader)
    j = nng.Jacobian(case.model, case.loader, nng.PushForwardImplicit)
    require(cross @ j, (cross.to_dense() @ jacobian.flatten(0, 1)).view(jacobian.shape[0], 2, -1))
    m = nng.FIM(case.model, case.loader, nng.PMatDense)
    dense = (cross @ j).materialize().tensor
    close(m.vTMv(cross @ j), torch.einsum("knd,de,kne->kn", dense, m.to_dense(), dense))
    with pytest.raises(nng.ArgumentError, match="square"):
        cross.solve(j, 0.1)


def test_errors():
    case, _ = truth("mlp")
    k = nng.GramMatrix(case.model, case.loader[:1])
    j = nng.Jacobian(case.model, case.loader, nng.PushForwardImplicit)
    for call in (lambda: k @ j, lambda: k.solve(j, 0.1)):
        with pytest.raises(nng.ArgumentError, match=r"expected \(3, "):
            call()
    whole = nng.GramMatrix(case.model, case.loader)
    with pytest.raises(nng.ArgumentTypeError, match="operand is"):
        whole @ (j.T + j.T)
    with pytest.raises(nng.ArgumentTypeError, match="operand is"):
        whole @ j.T
