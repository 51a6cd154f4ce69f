"""Hessians and covariances in Kronecker eigenbases: the diagonal of the exact matrix in the basis of others."""

import pytest
import torch
from cases import build

import nngeom as nng
from nngeom.core.layout import Arrangement, Layout, Piece
from nngeom.pmat.kronecker_basis import KroneckerBasis

f64 = torch.float64
MODELS = ["mlp", "conv2d", "embedding", "transformer", "tied", "bare"]
BY_MODEL = pytest.mark.parametrize("name", MODELS)


def in_basis(ekfac, exact):
    """``U diag(U^T M U) U^T`` with the eigenvectors of an EKFAC."""
    _, basis = ekfac.eigh()
    u = basis.to_dense()
    return (u * ((exact @ u) * u).sum(0)) @ u.T


def close(x, y, tol=1e-8):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


@BY_MODEL
def test_hessians_in_the_basis_of_the_gauss_newton_matrix(name):
    c = build(name)
    exact = nng.Hessian(c.model, c.loader, nng.PMatDense, loss="cross_entropy").to_dense()
    h = nng.Hessian(c.model, c.loader, nng.PMatEKFAC, loss="cross_entropy")
    assert type(h) is nng.PMatEKFAC and h.examples == c.n
    close(h.to_dense(), in_basis(nng.GGN(c.model, c.loader, nng.PMatEKFAC, loss="cross_entropy"), exact))
    close(h.trace(), exact.trace())


@BY_MODEL
def test_hessians_in_a_kept_basis(name):
    c = build(name)
    exact = nng.Hessian(c.model, c.loader, nng.PMatDense, loss="cross_entropy").to_dense()
    e = nng.EmpiricalFIM(c.model, c.loader, nng.PMatEKFAC, loss="cross_entropy")
    close(e.rescaled(c.model, c.loader, nng.Hessian, loss="cross_entropy").to_dense(), in_basis(e, exact))


@BY_MODEL
def test_covariances_in_the_basis_of_the_second_moment(name):
    c = build(name)
    exact = nng.GradientCovariance(c.model, c.loader, nng.PMatDense, loss="cross_entropy").to_dense()
    e = nng.EmpiricalFIM(c.model, c.loader, nng.PMatEKFAC, loss="cross_entropy")
    m = nng.GradientCovariance(c.model, c.loader, nng.PMatEKFAC, loss="cross_entropy")
    assert type(m) is nng.PMatEKFAC and m.examples == c.n
    close(m.to_dense(), in_basis(e, exact))
    close(m.trace(), exact.trace())
    again = e.rescaled(c.model, c.loader, nng.GradientCovariance, loss="cross_entropy")
    close(again.to_dense(), m.to_dense())


def test_covariances_are_second_moments_less_squared_means():
    c = build("mlp")
    e = nng.EmpiricalFIM(c.model, c.loader, nng.PMatEKFAC, loss="cross_entropy")
    m = nng.GradientCovariance(c.model, c.loader, nng.PMatEKFAC, loss="cross_entropy")
    u = e.eigh()[1].to_dense()
    for p in c.model.parameters():
        p.grad = None
    torch.nn.functional.cross_entropy(c.model(c.inputs), c.targets).backward()
    mean = nng.PVector.from_grad(c.model).flat()
    close(m.to_dense(), e.to_dense() - (u * (u.T @ mean).square()) @ u.T)


def test_mixtures_of_covariances():
    c = build("mlp")
    mixture = nng.PMatMixed({"0": nng.PMatEKFAC}, default=nng.PMatDense)
    m = nng.GradientCovariance(c.model, c.loader, mixture, loss="cross_entropy")
    exact = nng.GradientCovariance(c.model, c.loader, nng.PMatDense, loss="cross_entropy")
    close(m["2"].to_dense(), exact["2"].to_dense())
    e = nng.EmpiricalFIM(c.model, c.loader, nng.PMatEKFAC, loss="cross_entropy")
    close(m["0"].to_dense(), in_basis(e["0"], exact["0"].to_dense()))


@BY_MODEL
def test_hessians_keep_what_the_structure_keeps(name):
    """A unit's bias against its weights, the mean of the diagonal, and each in its place of a mixture."""
    c = build(name)
    exact = nng.Hessian(c.model, c.loader, nng.PMatDense, loss="cross_entropy").to_dense()
    quasi = nng.Hessian(c.model, c.loader, nng.PMatQuasiDiag, loss="cross_entropy")
    kept = _coupled(quasi)
    assert type(quasi) is nng.PMatQuasiDiag and quasi.examples == c.n
    close(quasi.to_dense(), torch.where(kept, exact, 0))
    eye = nng.Hessian(c.model, c.loader, nng.PMatEye, loss="cross_entropy")
    close(eye.to_dense(), exact.trace() / len(exact) * torch.eye(len(exact), dtype=f64))
    names = quasi.layer_collection.names
    mixture = nng.PMatMixed({names[0]: nng.PMatDiag}, default=nng.PMatDense)
    m = nng.Hessian(c.model, c.loader, mixture, loss="cross_entropy")
    first = len(m[names[0]].diag().flat())
    close(m[names[0]].to_dense(), exact[:first, :first].diagonal().diag())
    close(m[list(names[1:])].to_dense(), exact[first:, first:])


def _coupled(quasi):
    """Which entries a quasi-diagonal matrix holds: those of its diagonal, and of units against their biases."""
    held = torch.eye(quasi.shape[0], dtype=torch.bool)
    for layout in quasi.blocks:
        if len(layout.pieces) == 2:
            at = layout.indices()
            held[at[..., :-1].flatten(), at[..., -1:].expand_as(at[..., :-1]).flatten()] = True
    return held | held.T


def test_mixtures_of_hessians_in_bases():
    c = build("mlp")
    mixture = nng.PMatMixed({"0": nng.PMatEKFAC}, default=nng.PMatQuasiDiag)
    m = nng.Hessian(c.model, c.loader, mixture, loss="cross_entropy")
    h = [nng.Hessian(c.model, c.loader, k, loss="cross_entropy") for k in (nng.PMatEKFAC, nng.PMatQuasiDiag)]
    close(m["0"].to_dense(), h[0]["0"].to_dense())
    close(m["2"].to_dense(), h[1]["2"].to_dense())
    with pytest.raises(nng.UnsupportedError, match="average of outer products"):
        nng.Hessian(c.model, c.loader, nng.PMatMixed({"0": nng.PMatKFAC}, default=nng.PMatDiag), loss="cross_entropy")


def test_options_and_refusals():
    c = build("sequence")
    exact = nng.Hessian(c.model, c.loader, nng.PMatDense, loss="cross_entropy").to_dense()
    g = nng.GGN(c.model, c.loader, nng.PMatEKFAC, loss="cross_entropy", sharing="reduce")
    for h in (
        nng.Hessian(c.model, c.loader, nng.PMatEKFAC, loss="cross_entropy", sharing="reduce"),
        nng.Hessian(c.model, iter(c.loader), nng.PMatEKFAC.options(sharing="reduce"), loss="cross_entropy"),
    ):
        close(h.to_dense(), in_basis(g, exact))
    with pytest.raises(nng.ArgumentError, match="no option"):
        nng.Hessian(c.model, c.loader, nng.PMatEKFAC, loss="cross_entropy", shared=True)
    with pytest.raises(nng.ArgumentError, match="convex"):
        nng.Hessian(c.model, c.loader, nng.PMatEKFAC, loss=lambda f, y: -f.square().sum(1))
    with pytest.raises(nng.UnsupportedError, match="not as PMatKFAC"):
        nng.GradientCovariance(
            c.model, c.loader, nng.PMatMixed({"body": nng.PMatKFAC}, default=nng.PMatEKFAC), loss="mse"
        )


@pytest.mark.parametrize("sizes", [(1, 3, 4), (2, 3, 4), (1, 1, 5), (3, 4, 1)])
@pytest.mark.parametrize("sides", ["both", "inputs", "outputs", "neither"])
def test_rows_turned_into_an_eigenbasis(sizes, sides, monkeypatch):
    """Many at once, some columns at a time in any order: as one by one."""
    torch.manual_seed(0)
    s, o, i = sizes
    ua, ug = (torch.linalg.qr(torch.randn(s, p, p, dtype=f64))[0] for p in (i, o))
    basis = KroneckerBasis(ua if sides in ("both", "inputs") else None, ug if sides in ("both", "outputs") else None)
    x, scale = torch.randn(7, *sizes, dtype=f64), torch.rand(sizes, dtype=f64)
    expected = torch.stack([scale * basis.tmv(row) for row in x])
    flat = torch.zeros(7, x[0].numel() + 3, dtype=f64)
    pieces = (Piece(("a",), 2, Arrangement.plain(s, o, i)),)
    Layout(pieces).scatter_(flat, x)
    for piece in (1, 2**20):
        monkeypatch.setattr("nngeom.pmat.kronecker_basis.PIECE", piece)
        monkeypatch.setattr("nngeom.pmat.block.PIECE", piece)
        columns = torch.cat(list(basis.columns_of(flat, Layout(pieces), scale)), 1)
        assert columns.shape == (7, s * o * i)
        rows = expected.flatten(1)
        close(columns @ columns.T, rows @ rows.T, 1e-12)
        close(columns.sort(1)[0], rows.sort(1)[0], 1e-12)
