"""Options of the Kronecker representations: uncorrelated places of a window, new eigenvalues in a kept basis."""

import pytest
import reference
import torch
from cases import build
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.pmat.factors import product_of_marginals
from nngeom.pmat.kronecker import KroneckerBlock

WINDOWS = (
    "conv1d",
    "conv2d",
    "conv2d-same",
    "conv2d-circular",
    "depthwise",
    "conv3d",
    "deconv1d",
    "deconv2d",
    "deconv3d",
)


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def projected(plain):
    """SUA from its definition: the channel-by-channel part of every input factor of plain KFAC, averaged over
    places.
    """
    blocks = {}
    for layout, block in plain.blocks.items():
        w, a = layout.pieces[0].arrangement.window, block.a
        bias = len(layout.pieces) == 2
        weights = a[:, :-1, :-1] if bias else a
        channels = weights.unflatten(2, (-1, w)).unflatten(1, (-1, w))  # [s c w c w]
        mean = torch.einsum("scwdw->scd", channels) / w
        new = torch.zeros_like(a)
        for s in range(len(a)):
            whole = torch.kron(mean[s], torch.eye(w, dtype=a.dtype))
            new[s, : len(whole), : len(whole)] = whole
        if bias:
            new[:, -1, -1] = a[:, -1, -1]
        blocks[layout] = KroneckerBlock(new, block.g) if w > 1 else block
    return plain.of_blocks(plain.layer_collection, blocks, plain.examples)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", WINDOWS)
def test_sua_against_its_definition(name, sharing):
    c = build(name)
    plain = nng.FIM(c.model, c.loader, nng.PMatKFAC, sharing=sharing)
    sua = nng.FIM(c.model, c.loader, nng.PMatKFAC, sharing=sharing, sua=True)
    truth = projected(plain)
    close(sua.to_dense(), truth.to_dense())
    close(sua.trace(), plain.trace())
    v = nng.PVector.randn(sua.layer_collection, dtype=torch.float64)
    close(sua.solve(v, 0.1).flat(), truth.solve(v, 0.1).flat())
    assert sua.nbytes() < plain.nbytes() or name == "depthwise"
    close(
        nng.merge(*(nng.FIM(c.model, [b], nng.PMatKFAC, sharing=sharing, sua=True) for b in c.loader)).to_dense(),
        truth.to_dense(),
    )


@pytest.mark.parametrize("name", WINDOWS)
def test_sua_ekfac_has_exact_second_moments_in_the_sua_basis(name):
    c = build(name)
    f = reference.fisher(c.model, c.inputs)
    sua, kfac = (nng.FIM(c.model, c.loader, kind, sua=True) for kind in (nng.PMatEKFAC, nng.PMatKFAC))
    values, basis = sua.eigh()
    u = basis.to_dense()
    close(values, (u.T @ f @ u).diagonal())
    close(sua.trace(), f.trace())
    assert (f - sua.to_dense()).norm() <= (f - kfac.to_dense()).norm() * (1 + 1e-9)


def test_sua_changes_nothing_without_windows(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randn(5, 2, 2, 2, dtype=torch.float64)
    for kind in (nng.PMatKFAC, nng.PMatEKFAC):
        a, b = (nng.FIM(model, x, kind, sua=s) for s in (False, True))
        assert torch.equal(a.to_dense(), b.to_dense()) and a.blocks.keys() == b.blocks.keys()
    c = build("conv2d")
    m = nng.FIM(c.model, c.loader, nng.PMatEKFAC, sua=True)
    nng.save(m, tmp_path / "m")
    close(nng.load(tmp_path / "m").to_dense(), m.to_dense())


def test_sua_in_a_mixture_and_within_the_budget():
    c = build("conv2d")
    whole = nng.FIM(c.model, c.loader, nng.PMatKFAC, sua=True).to_dense()
    mixed = nng.FIM(c.model, c.loader, nng.PMatMixed({"*weight": nng.PMatKFAC.options(sua=True)}, default=nng.PMatKFAC))
    n = c.model.body[0].weight.numel()
    close(mixed.to_dense()[:n, :n], whole[:n, :n])
    for kind in (nng.PMatKFAC, nng.PMatEKFAC):
        cut = nng.FIM(c.model, c.loader, kind, sua=True, memory_budget=20_000)
        close(cut.to_dense(), nng.FIM(c.model, c.loader, kind, sua=True).to_dense())


# -- new eigenvalues ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sua", [False, True])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "deconv2d", "language-model", "residual", "gru"])
def test_rescaled(name, sua):
    c = build(name)
    m = nng.FIM(c.model, c.loader, nng.PMatEKFAC, sua=sua)
    close(m.rescaled(c.model, c.loader).to_dense(), m.to_dense())
    with torch.no_grad():
        for p in c.model.parameters():
            p.mul_(0.8)
    u = m.eigh()[1].to_dense()
    g = reference.loss_gradients(c.model, c.inputs, c.targets, lambda f, y: F.cross_entropy(f, y, reduction="none"))
    for new, truth in (
        (m.rescaled(c.model, c.loader), reference.fisher(c.model, c.inputs)),
        (m.rescaled(c.model, c.loader, nng.EmpiricalFIM, loss="cross_entropy"), g.T @ g / len(g)),
        (
            m.rescaled(c.model, c.loader[:1], measure=nng.FIM, memory_budget=20_000),
            reference.fisher(c.model, c.loader[0][0]),
        ),
    ):
        assert type(new) is nng.PMatEKFAC
        close(new.to_dense(), u @ (u.T @ truth @ u).diagonal().diag() @ u.T)


def test_rescaled_options_dtype_and_refusals():
    c = build("mlp")
    m = nng.FIM(c.model, c.loader, nng.PMatEKFAC)
    g = lambda: torch.Generator().manual_seed(3)
    drawn = m.rescaled(c.model, c.loader, nng.FIM_MonteCarlo, samples=2, generator=g())
    close(drawn.trace(), nng.FIM_MonteCarlo(c.model, c.loader, nng.PMatDiag, samples=2, generator=g()).trace())
    narrow = m.to(torch.float32).rescaled(c.model, c.loader)
    assert narrow.dtype == torch.float32
    close(narrow.to_dense().double(), m.to_dense(), 1e-5)
    other = build("conv2d")
    with pytest.raises(nng.CollectionError):
        m.rescaled(other.model, other.loader)
    with pytest.raises(nng.StructureError, match="used differently"):
        m.rescaled(c.model, c.loader, function=lambda x, y: inside_out(c.model, x))


def inside_out(model, x):
    """The weights inside of an unknown operation."""
    return model[2](torch.tanh(F.linear(x, torch.sinh(model[0].weight), model[0].bias)))


# -- a parameter in unlike uses ----------------------------------------------------------------------------------------


def partial_traces(pairs):
    """``tr_g`` and ``tr_a`` of ``sum_j g_j (x) a_j``, and its trace."""
    full = [(a if a.ndim == 3 else torch.diag_embed(a), g if g.ndim == 3 else torch.diag_embed(g)) for a, g in pairs]
    over = lambda f: f.diagonal(dim1=-2, dim2=-1).sum()
    return sum(a * over(g) for a, g in full), sum(g * over(a) for a, g in full), sum(over(a) * over(g) for a, g in full)


@pytest.mark.parametrize("scale", [1e-8, 0.3, 1.0, 50.0, 1e8])
@pytest.mark.parametrize("small", [1.0, 1e-4, 1e-9])
@pytest.mark.parametrize("diagonal", [False, True])
def test_unlike_uses_are_joined_with_their_partial_traces(scale, small, diagonal):
    g = torch.Generator().manual_seed(0)
    psd = lambda p: (lambda x: x.mT @ x)(torch.randn(1, p + 2, p, dtype=torch.float64, generator=g))
    pairs = [(scale * psd(4), small * psd(3)), (psd(4), small * psd(3))]
    if diagonal:
        pairs[1] = (pairs[1][0].diagonal(dim1=-2, dim2=-1), pairs[1][1])
    a, b = product_of_marginals(pairs)
    left, right, total = partial_traces(pairs)
    close(a * b.diagonal(dim1=-2, dim2=-1).sum(), left)
    close(b * a.diagonal(dim1=-2, dim2=-1).sum(), right)
    close(a.diagonal(dim1=-2, dim2=-1).sum() * b.diagonal(dim1=-2, dim2=-1).sum(), total)


def test_multiples_of_unlike_uses_are_merged_as_they_are():
    g = torch.Generator().manual_seed(0)
    psd = lambda p: (lambda x: x.mT @ x)(torch.randn(1, p + 2, p, dtype=torch.float64, generator=g))
    x, y = (KroneckerBlock.of(*(psd(p) for p in (4, 3) * 3)) for _ in "xy")
    once, twice = x.merged(y, 0.25, 0.75), x.scaled(2.0).merged(y.scaled(2.0), 0.25, 0.75)
    close(twice.dense(), 2 * once.dense())


def test_unlike_uses_without_gradients_are_zero_and_not_nan():
    zero, one = torch.zeros(1, 3, 3, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[None]
    for pairs in ([(one, zero), (2 * one, zero)], [(0 * one, zero), (one, zero)]):
        a, b = product_of_marginals(pairs)
        assert torch.isfinite(a).all() and not b.any()
    a, b = product_of_marginals([(one, zero), (one, zero + torch.eye(3))])  # one of them has none
    close(a * b.diagonal(dim1=-2, dim2=-1).sum(), 3 * one)
