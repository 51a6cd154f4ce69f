"""Identities of the theory: spectra, traces, exact cases of KFAC, what the eigenvalue correction gives, invariance."""

import pytest
import reference
import torch
from cases import CASES, STORED, build, representation
from torch import nn

import nngeom as nng

f64 = torch.float64


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * max(1e-3, float(b.abs().max())))


@pytest.fixture(params=["mlp", "conv2d", "transformer", "language-model"])
def case(request):
    return build(request.param)


def test_the_closed_form_is_the_label_weighted_sum(case):
    total = 0
    for label in range(3):
        y = torch.full((case.n,), label)
        g = reference.loss_gradients(
            case.model, case.inputs, y, lambda f, t: nn.functional.cross_entropy(f, t, reduction="none")
        )
        p = case.model(case.inputs).softmax(1)[:, label].detach()
        total = total + torch.einsum("n,nd,ne->de", p, g, g) / case.n
    close(nng.FIM(case.model, case.loader, nng.PMatDense).to_dense(), total)


def test_rank_and_spectrum(case):
    f = nng.FIM(case.model, case.loader, nng.PMatLowRank)
    values = f.eigh()[0]
    assert int((values > 1e-9 * values.max()).sum()) <= case.n * 2
    j, metric = reference.jacobian(case.model, case.inputs), reference.softmax_metric(case.model(case.inputs))
    eigenvalues, vectors = torch.linalg.eigh(metric)
    root = vectors @ torch.diag_embed(eigenvalues.clamp_min(0).sqrt()) @ vectors.mT
    rows = torch.einsum("nec,cnd->end", root, j).flatten(0, 1)
    spectrum = torch.linalg.eigvalsh(rows @ rows.T / case.n)
    m = min(len(spectrum), len(values))
    close(values.flip(0)[:m], spectrum.flip(0)[:m].clamp_min(0))


def test_the_fisher_matrix_is_the_hessian_of_the_kullback_leibler_divergence(case):
    f = nng.FIM(case.model, case.loader, nng.PMatDense)
    v = nng.PVector.randn(f.layer_collection, dtype=f64, generator=torch.Generator().manual_seed(1))
    v = 1e-3 * v / v.norm()
    before = case.model(case.inputs).detach().log_softmax(1)
    v.add_to(case.model)
    after = case.model(case.inputs).detach().log_softmax(1)
    kl = (before.exp() * (before - after)).sum(1).mean()
    assert abs(float(kl / (0.5 * f.vTMv(v))) - 1) < 1e-2


SOME = ("mlp", "conv2d", "language-model", "gru")  # in every representation; the others where recipes differ most
SWEPT = [(kind, name) for kind in STORED for name in CASES if name in SOME or kind in ("dense", "quasi-diag", "ekfac")]


@pytest.mark.parametrize(("kind", "name"), SWEPT)
def test_batches_budgets_and_order_do_not_matter(kind, name):
    c = build(name)
    r = representation(kind, c.model)
    whole = nng.FIM(c.model, [c.inputs], r).to_dense()
    singles = nng.FIM(c.model, [c.inputs[:1], c.inputs[1:]], r)
    close(singles.to_dense(), whole)
    if name != "shared-table":
        close(nng.FIM(c.model, [c.inputs.flip(0)], r, check=False).to_dense(), whole)
    small = nng.FIM(c.model, c.loader, r, memory_budget=20_000)
    close(small.to_dense(), whole)
    assert small.examples == c.n


def test_the_trace_of_kfac_is_that_of_its_factors():
    c = build("mlp")
    f = reference.fisher(c.model, c.inputs)
    kfac = nng.FIM(c.model, c.loader, nng.PMatKFAC)
    close(
        kfac.trace(),
        sum((b.a[0].trace() * b.g[0].trace() for b in kfac.blocks.values()), start=torch.zeros((), dtype=f64)),
    )
    assert abs(kfac.trace() - f.trace()) > 1e-6 * f.trace()


def exactness_cases():
    c = build("mlp")
    yield "one example", c.model, c.inputs[:1], "bernoulli", lambda m: lambda x: m(x)[:, :1]
    yield "constant input", nn.Linear(4, 3).double(), torch.ones(5, 4, dtype=f64), "categorical", None
    yield "single layer, identity metric", nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=f64), "gaussian", None


@pytest.mark.parametrize(
    "name,model,inputs,likelihood,function", exactness_cases(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_where_kfac_is_exact(name, model, inputs, likelihood, function):
    options = {"likelihood": likelihood, "function": function(model) if function else None}
    block, kfac, ekfac = (
        nng.FIM(model, [inputs], r, **options).to_dense() for r in (nng.PMatBlockDiag, nng.PMatKFAC, nng.PMatEKFAC)
    )
    close(kfac, block)
    close(ekfac, block)


def test_kronecker_order_of_flat_parameters():
    model, x = nn.Linear(4, 3, bias=False).double(), torch.randn(5, 4, dtype=f64)
    m = nng.FIM(model, [x], nng.PMatKFAC)
    (block,) = m.blocks.values()
    close(m.to_dense(), torch.kron(block.g[0], block.a[0]))


def test_quasi_diagonal_solve_and_its_refusal():
    c = build("conv2d")
    m = nng.FIM(c.model, c.loader, nng.PMatQuasiDiag)
    dense = m.to_dense()
    least = float(torch.linalg.eigvalsh(dense).min())
    assert least < 0
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    with pytest.raises(nng.SingularError, match="need not be positive") as error:
        m.solve(v, 0.5 * -least)
    enough = 1.01 * error.value.needed
    close(
        m.solve(v, enough).flat(), torch.linalg.solve(dense + enough * torch.eye(len(dense), dtype=f64), v.flat()), 1e-6
    )


def test_subset_is_the_sub_block():
    c = build("transformer")
    lc = nng.LayerCollection.from_model(c.model, include="*linear*")
    part = nng.FIM(c.model, c.loader, nng.PMatDense, layer_collection=lc)
    whole = nng.FIM(c.model, c.loader, nng.PMatDense)
    index, at = [], 0
    for name, shape in zip(whole.layer_collection.names, whole.layer_collection.shapes):
        size = torch.Size(shape).numel()
        index += range(at, at + size) if name in lc else []
        at += size
    close(part.to_dense(), whole.to_dense()[index][:, index])


def blocks(m, kind):
    """The dense blocks of a matrix by layout."""
    return {lay: b.dense() for lay, b in nng.FIM(m.model, m.loader, kind).blocks.items()}


@pytest.mark.parametrize("name", ["mlp", "sequence", "conv1d", "conv2d", "decoder", "transformer", "bare"])
def test_eigenvalue_correction(name):
    c = build(name)
    f = reference.fisher(c.model, c.inputs)
    kfac, ekfac = (nng.FIM(c.model, c.loader, r) for r in (nng.PMatKFAC, nng.PMatEKFAC))
    for layout, e in ekfac.blocks.items():
        index = layout.indices().flatten()
        truth = f[index][:, index]
        k = kfac.blocks[layout]
        corrected, product = e.dense(), k.dense()
        square = lambda x: x.square().sum()
        s, t = e.d, k.eigen().d
        close(square(truth - corrected), square(truth) - square(s), 1e-7)  # Pythagoras
        close(square(truth - product), square(truth - corrected) + square(s - t), 1e-7)
        shift = 0.1 * torch.randn(s.shape, dtype=f64)
        moved = type(e)(e.ua, e.ug, s + shift).dense()
        close(square(truth - moved), square(truth - corrected) + square(shift), 1e-7)
        exact = torch.linalg.eigvalsh(truth).flip(0).cumsum(0)  # Schur-Horn
        mine = s.flatten().sort(descending=True).values.cumsum(0)
        assert bool((mine <= exact + 1e-9 * exact[-1].abs() + 1e-15).all())
        close(mine[-1], exact[-1], 1e-8)


def test_factored_damping_is_the_additive_form_in_the_eigenbasis():
    c = build("mlp")
    kfac = nng.FIM(c.model, c.loader, nng.PMatKFAC)
    x = 0.3
    for block in kfac.blocks.values():
        e = block.eigen()
        a, g = (f + x**0.5 * torch.eye(f.shape[-1], dtype=f64) for f in (block.a, block.g))
        close((e.d + e.additive(x)).flatten().sort().values, torch.linalg.eigvalsh(torch.kron(g[0], a[0])), 1e-8)


@pytest.mark.parametrize("balanced", [True, False])
def test_factored_tikhonov_balances_the_factors(balanced):
    c = build("mlp")
    kfac = nng.FIM(c.model, c.loader, nng.PMatKFAC)
    v = nng.PVector.randn(kfac.layer_collection, dtype=f64)
    want = torch.empty_like(v.flat())
    for layout, b in kfac.blocks.items():
        pi = ((b.a[0].trace() / b.a.shape[-1]) / (b.g[0].trace() / b.g.shape[-1])).sqrt() if balanced else 1.0
        a = b.a[0] + pi * 0.1**0.5 * torch.eye(b.a.shape[-1], dtype=f64)
        g = b.g[0] + 0.1**0.5 / pi * torch.eye(b.g.shape[-1], dtype=f64)
        layout.scatter_(want, torch.linalg.solve(g, layout.gather(v.flat())[0] @ torch.linalg.inv(a))[None])
    close(kfac.solve(v, nng.FactoredTikhonov(0.1, balanced)).flat(), want, 1e-8)
    inverted = torch.cat(
        [
            b.inverse(nng.FactoredTikhonov(0.1, balanced)).mv(lay.gather(v.flat())).flatten()
            for lay, b in kfac.blocks.items()
        ]
    )
    close(inverted, torch.cat([lay.gather(want).flatten() for lay in kfac.blocks]), 1e-8)


@pytest.mark.parametrize("kind", [k for k in STORED if k != "quasi-diag"])  # cuts pairs, not eigenvalues
def test_cutoff_is_the_pseudo_inverse(kind):
    c = build("mlp")
    m = nng.FIM(c.model, c.loader, representation(kind, c.model))
    dense, v = m.to_dense(), nng.PVector.randn(m.layer_collection, dtype=f64)
    values, u = torch.linalg.eigh(dense)
    inverse = torch.where(values >= 1e-6, 1 / values, torch.zeros_like(values))
    want = (u * inverse) @ (u.T @ v.flat())
    solved = m.solve(v, nng.Cutoff(1e-6)).flat()
    torch.testing.assert_close(solved, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def test_large_damping_gives_the_gradient_and_least_squares_in_one_step():
    x, y = torch.randn(20, 4, dtype=f64), torch.randn(20, 3, dtype=f64)
    model = nn.Linear(4, 3).double()
    loss = 0.5 * (model(x) - y).square().sum(1).mean()
    loss.backward()
    g = nng.PVector.from_grad(model)
    for kind in (nng.PMatDense, nng.PMatKFAC, nng.PMatEKFAC):
        f = nng.FIM(model, [(x, y)], kind, likelihood="gaussian")
        close(1e8 * f.solve(g, 1e8).flat(), g.flat(), 1e-6)
        start = nng.PVector.from_model(model)
        f.solve(g, 1e-12).add_to(model, alpha=-1)
        ones = torch.cat([x, torch.ones(20, 1, dtype=f64)], 1)
        best = torch.linalg.lstsq(ones, y).solution.T
        close(model.weight.detach(), best[:, :-1], 1e-6)
        start.copy_to(model)


def test_undamped_kfac_is_invariant_to_linear_maps_of_the_input():
    x, w = torch.randn(30, 4, dtype=f64), torch.randn(4, 4, dtype=f64) + 3 * torch.eye(4, dtype=f64)
    y = torch.randint(0, 3, (30,))

    def change(inputs, map_in):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        model[0].weight.data = model[0].weight.data @ map_in
        nn.functional.cross_entropy(model(inputs), y).backward()
        lc = nng.LayerCollection.from_model(model, include="0")
        step = nng.FIM(model, [inputs], nng.PMatKFAC, layer_collection=lc).solve(
            nng.PVector.from_grad(model, lc), 1e-14
        )
        before = model(inputs).detach()
        step.add_to(model, alpha=-1)
        return model(inputs).detach() - before

    close(change(x, torch.eye(4, dtype=f64)), change(x @ w.T, torch.linalg.inv(w)), 1e-5)
