"""The contract of parameter-space matrices: every representation on every model of the zoo."""

import pickle

import pytest
import reference
import torch
from cases import CASES, build

import nngeom as nng

REPRESENTATIONS = {
    "dense": nng.PMatDense,
    "diag": nng.PMatDiag,
    "block-diag": nng.PMatBlockDiag,
    "quasi-diag": nng.PMatQuasiDiag,
    "kfac": nng.PMatKFAC,
    "kfac-reduce": nng.PMatKFAC.options(sharing="reduce"),
    "ekfac": nng.PMatEKFAC,
    "low-rank": nng.PMatLowRank,
    "eye": nng.PMatEye,
    "implicit": nng.PMatImplicit,
    "mixed": nng.PMatMixed({"*bias*": nng.PMatDiag, "*weight": nng.PMatKFAC}, default=nng.PMatLowRank),
}
EXACT_DIAGONAL = {"dense", "diag", "block-diag", "quasi-diag", "low-rank", "implicit"}
EXACT_TRACE = EXACT_DIAGONAL | {"ekfac", "eye"}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    torch.set_num_threads(1)
    c = build(request.param)
    c.__dict__["fisher"] = reference.fisher(c.model, c.inputs)
    c.__dict__["name"] = request.param
    return c


def mixed_for(case, kind):
    """The mixture's patterns must match something: models without weights or biases are mixed otherwise."""
    if kind != "mixed":
        return REPRESENTATIONS[kind]
    names = nng.LayerCollection.from_model(case.model).names
    half = {name: nng.PMatDiag for name in names[::2]}
    return nng.PMatMixed(half, default=nng.PMatKFAC) if len(names) > 1 else nng.PMatMixed({names[0]: nng.PMatEKFAC})


@pytest.mark.parametrize("kind", REPRESENTATIONS)
def test_contract(case, kind):
    m = nng.FIM(case.model, case.loader, mixed_for(case, kind))
    f, d = case.fisher, case.fisher.shape[0]
    close = lambda x, y, tol=1e-9: torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(f.abs().max()))
    dense = m.to_dense()
    assert m.shape == (d, d) and m.dtype == torch.float64 and dense.shape == (d, d)
    close(dense, dense.T)
    if kind in ("dense", "low-rank", "implicit"):
        close(dense, f)
    if kind in EXACT_DIAGONAL:
        close(dense.diagonal(), f.diagonal())
    if kind in EXACT_TRACE:
        close(dense.trace(), f.trace())
    if kind == "block-diag":
        for lo, hi in blocks(m.layer_collection):
            close(dense[lo:hi, lo:hi], f[lo:hi, lo:hi])
    lc, eye = m.layer_collection, torch.eye(d, dtype=torch.float64)
    v = nng.PVector.randn(lc, 2, dtype=torch.float64)
    close(m.mv(v).flat(), v.flat() @ dense)
    close((m @ v).flat(), v.flat() @ dense)
    close(m.vTMv(v), ((v.flat() @ dense) * v.flat()).sum(-1), 1e-8)
    close(m.trace(), dense.trace())
    close(m.diag().flat(), dense.diagonal())
    close(m.norm("fro"), dense.norm())
    damping = 0.1 + 1.1 * max(0.0, -float(torch.linalg.eigvalsh(dense).min()))
    damped = dense + damping * eye
    tol = 1e-5 if kind == "implicit" else 1e-8
    solved = torch.linalg.solve(damped, v.flat().T).T
    torch.testing.assert_close(m.solve(v, damping).flat(), solved, rtol=tol, atol=tol * float(solved.abs().max()))
    torch.testing.assert_close(m.inverse(damping).mv(v).flat(), solved, rtol=tol, atol=tol * float(solved.abs().max()))
    close((2 * m - m / 2).mv(v).flat(), 1.5 * (v.flat() @ dense))
    close(torch.as_tensor(m.to_scipy() @ v.flat()[0].numpy()), dense @ v.flat()[0])
    if kind == "implicit":
        for refused in (m.eigh, m.logdet, lambda: m.sample(2, 0.1)):
            with pytest.raises(nng.UnsupportedError, match="lanczos"):
                refused()
        top, vectors = m.lanczos(1, generator=torch.Generator().manual_seed(0))
        close(top[0], torch.linalg.eigvalsh(f)[-1], 1e-6)
        return
    values, basis = m.eigh()
    u = basis.to_dense()
    close(values, torch.linalg.eigvalsh(dense), 1e-8)
    torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=1e-9)
    close(u @ values.diag() @ u.T, dense, 1e-8)
    close(basis.T.mv(basis.mv(v)).flat(), v.flat())
    torch.testing.assert_close(m.logdet(damping), torch.logdet(damped), rtol=1e-7, atol=1e-7)
    root = m.sample(3, damping, generator=torch.Generator().manual_seed(0))
    assert root.shape == (3, d) and bool(torch.isfinite(root.flat()).all())
    copy = pickle.loads(pickle.dumps(m))
    assert torch.equal(copy.to_dense(), dense) and type(copy) is type(m) and copy.examples == case.n
    assert m.to(torch.float32).mv(v).dtype == torch.float32


def blocks(lc):
    """Flat ranges of the layers."""
    table, at = [], 0
    for layer in dict.fromkeys(lc.layers):
        size = sum(torch.Size(s).numel() for s, own in zip(lc.shapes, lc.layers) if own == layer)
        table.append((at, at + size))
        at += size
    return table


def test_ekfac_is_no_farther_than_kfac(case):
    """AC-2 2.1, with the exact block diagonal of each unit as truth."""
    f = case.fisher
    k, e = (nng.FIM(case.model, case.loader, r).to_dense() for r in (nng.PMatKFAC, nng.PMatEKFAC))
    assert (f - e).norm() <= (f - k).norm() * (1 + 1e-9)


def test_sample_covariance():
    c = build("mlp")
    for kind in (nng.PMatDense, nng.PMatEKFAC, nng.PMatLowRank, nng.PMatDiag):
        m = nng.FIM(c.model, c.loader, kind)
        x = m.sample(40_000, 0.5, generator=torch.Generator().manual_seed(0)).flat()
        expected = m.inverse(0.5).to_dense()
        assert ((x.T @ x / len(x)) - expected).norm() / expected.norm() < 0.05


def test_nothing_is_left_on_the_model(case):
    before = {n: (set(vars(m)), dict(m._forward_hooks), dict(m._backward_hooks)) for n, m in case.model.named_modules()}
    nng.FIM(case.model, case.loader, nng.PMatDiag)
    after = {n: (set(vars(m)), dict(m._forward_hooks), dict(m._backward_hooks)) for n, m in case.model.named_modules()}
    assert before == after
    assert all(p.grad is None for p in case.model.parameters())
