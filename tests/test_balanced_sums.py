"""Kronecker products beside a diagonal, an arrow or rows: by scaling, a column apart, roots, turned rows."""

import functools
from dataclasses import replace

import pytest
import torch
from cases import build
from torch import nn

import nngeom as nng
from nngeom.core import lapack
from nngeom.core.damping import Tikhonov
from nngeom.pmat.arrow_root import ArrowRoot
from nngeom.pmat.balanced import balanced
from nngeom.pmat.block import EyeBlock
from nngeom.pmat.border import Bordered, by_eigenvectors
from nngeom.pmat.dense import DenseBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.near import along, partial_traces
from nngeom.pmat.quasi_diag import ArrowBlock
from nngeom.pmat.regroup import Rows
from nngeom.pmat.set_apart import set_apart, without_column
from nngeom.pmat.sum_block import SumBlock
from nngeom.pmat.sum_logdet import near_identity

f64 = torch.float64
O, I = 5, 7


def generator(seed):
    return torch.Generator().manual_seed(seed)


def spd(p, seed, rank=None):
    x = torch.randn(1, p, rank or 2 * p, generator=generator(seed), dtype=f64)
    return x @ x.mT / x.shape[-1]


def diagonal(seed, odd_column):
    g = generator(seed)
    d = torch.rand(O, 1, generator=g, dtype=f64) * torch.rand(1, I, generator=g, dtype=f64) + 0.01
    d = d * (1 + 0.1 * torch.rand(O, I, generator=g, dtype=f64))
    if odd_column:
        d[:, -1] = 3 * torch.rand(O, generator=g, dtype=f64) + 0.02
    return d[None]


def terms(kind):
    products = [(2.0, KroneckerBlock(spd(I, 1), spd(O, 2, rank=3)))]
    if "two" in kind:
        products.append((0.5, KroneckerBlock(spd(I, 3), torch.rand(1, O, generator=generator(4), dtype=f64))))
    if "spectrum" in kind:
        eigen = products[0][1].eigen()
        eigen = replace(eigen, d=eigen.d * torch.rand(eigen.d.shape, generator=generator(6), dtype=f64))
        products = [(1.5, replace(eigen, ug=None) if "own" in kind else eigen), *products[1:]]
    d = diagonal(5, "column" in kind)
    beside = (0.7, DiagBlock(d))
    if "arrow" in kind:
        c = 0.2 * (d[..., :-1] * d[..., -1:]).sqrt() / I**0.5
        beside = (0.7, ArrowBlock(d, c))
    eye = [(1.0, EyeBlock(torch.tensor(0.05, dtype=f64), 1, O, I))] if "eye" in kind else []
    return [*products, beside, *eye]


def dense(parts):
    return sum(w * part.dense() for w, part in parts)


KINDS = ["plain", "column", "two", "two column eye", "arrow", "arrow column", "arrow two"]
KINDS += ["spectrum", "spectrum column", "spectrum two", "spectrum own", "spectrum arrow"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [0.0, 1e-2])
def test_scaling_is_a_congruence(kind, x):
    """``log det M`` is that of what is near the identity, and of the scaling, to rounding."""
    parts = terms(kind)
    matrix, logdet = near_identity(SumBlock(tuple(p for _, p in parts), tuple(w for w, _ in parts)), x)
    eye = torch.eye(O * I, dtype=f64)
    b = matrix.product(eye)
    torch.testing.assert_close(b, b.T)
    whole = dense(parts) + x * eye
    torch.testing.assert_close(logdet + torch.linalg.slogdet(b)[1], torch.linalg.slogdet(whole)[1])
    torch.testing.assert_close(matrix.first, b.trace() - O * I, atol=1e-10, rtol=1e-9)
    assert float((b - eye).norm()) < float((whole / whole.diagonal().mean() - eye).norm())


def test_a_column_is_set_apart():
    parts = terms("column")
    found = balanced(parts, 1e-2)
    assert found.apart is not None and found.apart[0] == I - 1
    assert without_column(found) is not None
    near, _ = near_identity(SumBlock(tuple(p for _, p in parts), tuple(w for w, _ in parts)), 1e-2)
    eye = torch.eye(O * I, dtype=f64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nngeom.pmat.set_apart.MOST", 0)
        far, _ = near_identity(SumBlock(tuple(p for _, p in parts), tuple(w for w, _ in parts)), 1e-2)
    assert float((near.product(eye) - eye).norm()) < 0.7 * float((far.product(eye) - eye).norm())
    assert (
        balanced(terms("plain"), 1e-2).apart is None or float(balanced(terms("plain"), 1e-2).apart[1].abs().max()) < 1
    )


def test_nothing_indefinite_is_set_apart():
    parts = terms("column")
    (nearby, few), found = without_column(balanced(parts, 0.0)), balanced(parts, 0.0)
    assert nearby.sizes == found.nearby.sizes
    matrix, _ = near_identity(SumBlock(tuple(p for _, p in parts), tuple(w for w, _ in parts)), 0.0)
    shifted = type(few)(few.rows, few.n - 2 * float(torch.linalg.eigvalsh(few.n).max()) * torch.eye(O, dtype=f64))
    values = torch.linalg.eigvalsh(shifted.n)
    assert (set_apart(matrix, shifted) is None) == bool((1 + values <= 1e-3).any())


def test_what_is_not_scaled():
    eye = (1.0, EyeBlock(torch.tensor(0.05, dtype=f64), 1, O, I))
    product = terms("plain")[0]
    assert balanced([product, eye], 0.1) is None
    assert balanced([terms("plain")[1], eye], 0.1) is None
    dense_block = DenseBlock(torch.eye(O * I, dtype=f64))
    assert balanced([product, (1.0, dense_block), terms("plain")[1]], 0.1) is None
    assert balanced([product, (-1.0, DiagBlock(diagonal(1, False)))], 0.0) is None


@pytest.mark.parametrize("kind", KINDS)
def test_inverse_preconditions(kind):
    parts = terms(kind)
    whole = dense(parts) + 1e-2 * torch.eye(O * I, dtype=f64)
    inverse = balanced(parts, 1e-2).inverse.dense()
    root = torch.linalg.cholesky(inverse)
    before, after = torch.linalg.cond(whole), torch.linalg.cond(root.T @ whole @ root)
    assert float(after) < 0.5 * float(before)


def test_arrows_in_a_basis():
    arrow = ArrowBlock(diagonal(5, False), 0.1 * diagonal(6, False)[..., :-1])
    ua, ug = (torch.linalg.qr(spd(p, p))[0].contiguous() for p in (I, O))
    m = arrow.dense().reshape(O, I, O, I)
    a, g = partial_traces(arrow)
    torch.testing.assert_close(a[0], m.diagonal(dim1=0, dim2=2).sum(-1))
    torch.testing.assert_close(torch.diag(g[0]), m.diagonal(dim1=1, dim2=3).sum(-1))
    for x, y in ((ua, ug), (None, ug), (ua, None), (None, None)):
        u = torch.kron(torch.eye(O, dtype=f64) if y is None else y[0], torch.eye(I, dtype=f64) if x is None else x[0])
        expected = (u.T @ arrow.dense() @ u).diagonal().reshape(1, O, I)
        torch.testing.assert_close(along(arrow, x, y), expected)


def test_a_root_of_arrows():
    d = diagonal(5, False)
    arrow = ArrowBlock(d, 0.3 * (d[..., :-1] * d[..., -1:]).sqrt() / I**0.5)
    root = ArrowRoot.of(arrow, 0.1)
    low = root.times(torch.eye(O * I, dtype=f64).view(-1, 1, O, I)).flatten(1).T
    torch.testing.assert_close(low @ low.T, arrow.dense() + 0.1 * torch.eye(O * I, dtype=f64))
    least = float(torch.linalg.eigvalsh(ArrowBlock(d, 10 * d[..., :-1]).dense()).min())
    assert least < 0 and ArrowRoot.of(ArrowBlock(d, 10 * d[..., :-1]), -0.99 * least) is None
    assert ArrowRoot.of(ArrowBlock(d, 10 * d[..., :-1]), -1.01 * least) is not None
    assert ArrowRoot.of(ArrowBlock(-d, d[..., :-1]), 0.0) is None


@functools.cache
def measured(name):
    case = build(name)
    x, y = case.loader[:1], case.loader[1:] or case.loader[:1]
    return {kind: nng.FIM(case.model, x if "Low" in kind.__name__ else y, kind) for kind in (
        nng.PMatKFAC, nng.PMatEKFAC, nng.PMatDiag, nng.PMatQuasiDiag, nng.PMatBlockDiag, nng.PMatLowRank)}  # fmt: skip


@pytest.mark.parametrize("name", ["mlp", "conv2d"])
@pytest.mark.parametrize("base", [nng.PMatKFAC, nng.PMatEKFAC, nng.PMatDiag, nng.PMatBlockDiag])
def test_rows_beside_blocks(name, base, monkeypatch):
    """Rows turned by the root of the inverse, and solved with: the same ``C``."""
    monkeypatch.setattr("nngeom.pmat.partitioned.ITERATED", 1)
    monkeypatch.setattr("nngeom.pmat.block.PIECE", 1)
    monkeypatch.setattr("nngeom.pmat.kronecker_basis.PIECE", 1)
    b, low = measured(name)[base], measured(name)[nng.PMatLowRank]
    m, x = b + 0.5 * low, 0.03
    whole = m.to_dense() + x * torch.eye(m.shape[0], dtype=f64)
    v = torch.randn(3, m.shape[0], generator=generator(0), dtype=f64)
    batch = nng.PVector(m.layer_collection, v)
    torch.testing.assert_close(m.solve(batch, x).flat(), torch.linalg.solve(whole, v.T).T)
    torch.testing.assert_close(m.logdet(x), torch.linalg.slogdet(whole)[1])
    blocks = m.partitioned()
    if len(blocks.rows.r) < m.shape[0]:
        kept = {k: by_eigenvectors(block) for k, block in blocks.blocks.items()}
        found = Bordered.of(kept, blocks.rows, Tikhonov(x))
        base_dense = b.to_dense() + x * torch.eye(m.shape[0], dtype=f64)
        r = blocks.rows.r
        torch.testing.assert_close(found.c, torch.eye(len(r), dtype=f64) + r @ torch.linalg.solve(base_dense, r.T))
        torch.testing.assert_close(found.logdet(), torch.linalg.slogdet(found.c)[1])


def test_derivatives_where_one_block_has_a_graph(monkeypatch):
    """The products of rows turned with a graph and without one are of the same ``C``."""
    monkeypatch.setattr("nngeom.pmat.partitioned.ITERATED", 1)
    kfac, low = measured("mlp")[nng.PMatKFAC], measured("mlp")[nng.PMatLowRank]
    (name, (a, g)), *rest = kfac.factors().items()
    weight = torch.tensor(1.5, dtype=f64, requires_grad=True)

    def value(w):
        m = nng.PMatKFAC.from_factors(kfac.layer_collection, {name: (a, g), **dict(rest)})
        blocks = dict(m.blocks)
        first = next(iter(blocks))
        blocks[first] = blocks[first].scaled(w)
        return (nng.PMatKFAC.of_blocks(m.layer_collection, blocks, 1) + low).logdet(0.1)

    (found,) = torch.autograd.grad(value(weight), weight)
    step = 1e-4
    expected = (value(weight.detach() + step) - value(weight.detach() - step)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


def test_derivatives_pass_through_turned_rows(monkeypatch):
    """In reverse and in forward mode, of as many rows as half of the products are formed of."""
    monkeypatch.setattr("nngeom.pmat.partitioned.ITERATED", 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    data = [(torch.randn(40, 12, generator=generator(0), dtype=f64),)]
    m = nng.FIM(model, data, nng.PMatEKFAC) + nng.FIM(model, data, nng.PMatLowRank)
    assert len(m.partitioned().rows.r) >= lapack.ROWS
    damping = torch.tensor(0.05, dtype=f64, requires_grad=True)
    m.logdet(damping).backward()
    expected = torch.linalg.inv(m.to_dense() + 0.05 * torch.eye(m.shape[0], dtype=f64)).trace()
    torch.testing.assert_close(damping.grad, expected)
    x = damping.detach()
    torch.testing.assert_close(torch.func.grad(m.logdet)(x), expected)
    torch.testing.assert_close(torch.func.jvp(m.logdet, (x,), (torch.ones_like(x),))[1], expected)


def test_singular_blocks_beside_rows(monkeypatch):
    monkeypatch.setattr("nngeom.pmat.partitioned.ITERATED", 1)
    lc = measured("mlp")[nng.PMatKFAC].layer_collection
    zero = nng.PMatDiag.from_vector(nng.PVector(lc, torch.zeros(lc.numel, dtype=f64)))
    rows = Rows(torch.ones(1, lc.numel, dtype=f64), torch.ones(1, dtype=f64))
    with pytest.raises(nng.SingularError):
        Bordered.of(zero.blocks, rows, Tikhonov(0.0))
    minus = Rows(torch.ones(1, lc.numel, dtype=f64), -torch.ones(1, dtype=f64))
    with pytest.raises(nng.SingularError, match="singular or indefinite"):
        Bordered.of(zero.blocks, minus, Tikhonov(0.1))
    assert Bordered.of(zero.blocks, minus, Tikhonov(10.0 * lc.numel)).c.shape == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("rows", [1, 63, 64, 150])
def test_half_of_the_products_of_rows(dtype, rows):
    x = torch.randn(rows, 90, generator=generator(0), dtype=f64).to(dtype)
    y = torch.randn(20, rows, generator=generator(1), dtype=f64).to(dtype).T  # with the rows innermost
    found = lapack.half_gram(x, iter((x[:, :40].contiguous(), x[:, 40:].contiguous(), y)))
    assert found.dtype == dtype and found.shape == (rows, rows)
    torch.testing.assert_close(found.triu(), (x @ x.T + y @ y.T).triu())


@pytest.mark.parametrize("kind", [nng.PMatDiag, nng.PMatQuasiDiag])
def test_estimates_reach_what_was_asked_for(kind, monkeypatch):
    """Of ReLU nets, whose dead units and biases a product of rows and columns does not fit; strong arrows are told."""
    monkeypatch.setattr("nngeom.pmat.sum_logdet.ITERATED", 1)
    monkeypatch.setattr("nngeom.pmat.sum_logdet.FACTORED", 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 14), nn.ReLU(), nn.Linear(14, 3)).double()
    tasks = [[(torch.randn(40, 12, generator=generator(j), dtype=f64),)] for j in range(2)]
    m = nng.FIM(model, tasks[0], nng.PMatKFAC) + nng.FIM(model, tasks[1], kind)
    dense = m.to_dense()
    x = max(1e-2, 1e-2 - 2 * float(torch.linalg.eigvalsh(dense).min()))
    expected = torch.linalg.slogdet(dense + x * torch.eye(len(dense), dtype=f64))[1]
    found = [m.logdet(x, estimator="slq", tol=1e-4, generator=generator(j)) for j in range(6)]
    for e in found:
        assert kind is nng.PMatQuasiDiag or float(e.standard_error) <= 1e-4 * m.shape[0]
        assert abs(float(e) - float(expected)) <= 5 * float(e.standard_error)
