"""Factors above a side limit: what is kept of them, what is said of what is not, and the algebra of what is."""

import functools

import pytest
import torch
from cases import build
from torch import nn

import nngeom as nng
from nngeom import checks as nngeom_checks
from nngeom.core import linalg
from nngeom.core.completed import CompletedBasis
from nngeom.core.sketch import normal_vectors, sketch_eigh

f64 = torch.float64
LIMIT = 12


class Conv1D(nn.Module):
    """A linear layer with its weight transposed, as GPT-2 has it."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


@functools.cache
def setting(kind):
    torch.manual_seed(0)
    if kind == "positions":
        model = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 16), nn.Flatten(1), nn.Linear(48, 4))
        batches = [(torch.randn(n, 3, 5, dtype=f64), torch.randint(0, 4, (n,))) for n in (5, 4)]
    elif kind == "wide head":
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 16, bias=False), nn.Tanh(), nn.Linear(16, 36))
        batches = [(torch.randn(n, 5, dtype=f64), torch.randint(0, 36, (n,))) for n in (6, 3)]
    elif kind == "head at positions":
        model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 36))
        batches = [(torch.randn(n, 2, 5, dtype=f64), torch.randint(0, 36, (n, 2))) for n in (5, 4)]
    elif kind == "convolution":
        head = nn.Sequential(nn.Flatten(1), nn.Linear(32, 3))
        model = nn.Sequential(nn.Conv2d(4, 16, 2), nn.Tanh(), nn.Conv2d(16, 8, 2, bias=False), head)
        batches = [(torch.randn(n, 4, 4, 4, dtype=f64), torch.randint(0, 3, (n,))) for n in (6, 3)]
    elif kind == "transposed":
        model = nn.Sequential(Conv1D(20, 6), nn.Tanh(), Conv1D(14, 20), nn.Tanh(), nn.Linear(14, 4))
        batches = [(torch.randn(n, 6, dtype=f64), torch.randint(0, 4, (n,))) for n in (6, 3)]
    else:
        model = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 16, bias=False), nn.Tanh(), nn.Linear(16, 4))
        batches = [(torch.randn(n, 5, dtype=f64), torch.randint(0, 4, (n,))) for n in (6, 3)]
    return model.double(), batches


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def cut(factor, form, limit=LIMIT):
    """A dense factor ``[p, p]`` as it is kept."""
    p = len(factor)
    if p <= limit:
        return factor
    if form == "diagonal":
        return torch.diag(factor.diagonal())
    q = next(p // b for b in range(-(-p // limit), p + 1) if p % b == 0)
    return torch.block_diag(*(factor[lo : lo + q, lo : lo + q] for lo in range(0, p, q)))


def dense(block):
    a, g = (torch.diag_embed(f) if linalg.is_diagonal(f) else f for f in (block.a, block.g))
    return a, g


def cut_inputs(a, form, *, bias):
    """Of inputs, the one of a bias last, which is a block of its own."""
    if form == "diagonal" or not bias or len(a) <= LIMIT:
        return cut(a, form)
    return torch.block_diag(cut(a[:-1, :-1], form), a[-1:, -1:])


def block_of(a, g, *, bias, transposed):
    """``g (x) a`` in the order of the parameters: the weight ``[o, i]``, or ``[i, o]``, and behind it the bias."""
    o, i = len(g), len(a) - bias
    at = torch.arange(o * len(a)).view(o, len(a))
    weight = at[:, :i].T if transposed else at[:, :i]
    order = torch.cat([weight.flatten(), at[:, i:].flatten()])
    return torch.kron(g, a)[order][:, order]


KINDS = ["plain", "positions", "wide head", "head at positions", "convolution", "transposed"]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("form", ["diagonal", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept(kind, form, sharing):
    model, loader = setting(kind)
    whole = nng.FIM(model, loader, nng.PMatKFAC, sharing=sharing)
    m = nng.FIM(model, loader, nng.PMatKFAC, sharing=sharing, factor_limit=LIMIT, factor_form=form)
    said = {(d.parameters[0], d.factor): d for d in m.dropped}
    for layout, block in whole.blocks.items():
        name, bias = layout.names[0], len(layout.names) > 1
        a, g = (x[0] for x in dense(block))
        kept = {"A": cut_inputs(a, form, bias=bias), "G": cut(g, form)}
        exact = block_of(kept["A"], kept["G"], bias=bias, transposed=not layout.pieces[0].arrangement.is_plain())
        close(m[name.rpartition(".")[0]].to_dense(), exact)
        for side, factor in (("A", a), ("G", g)):
            assert ((name, side) in said) == (len(factor) > LIMIT)
            if (name, side) in said:
                d, share = said[name, side], float((factor - kept[side]).norm() / factor.norm())
                assert d.side == len(factor) and d.form == form
                assert abs(d.share - share) <= 4 * d.standard_error + 1e-9 and d.standard_error < 0.5
                assert f"of {side} ({len(factor)}) of {name}" in repr(m)
    assert not whole.dropped and "kept" not in repr(whole)


FORMS = ["diagonal", "block", "low_rank", ("low_rank", 3)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_algebra(kind, form, tmp_path):
    model, loader = setting(kind)
    options = {"factor_limit": LIMIT, "factor_form": form}
    m, e = (nng.FIM(model, loader, r, **options) for r in (nng.PMatKFAC, nng.PMatEKFAC))
    exact = nng.FIM(model, loader, nng.PMatDense).to_dense()
    close(e.trace(), exact.trace())
    assert (e.to_dense() - exact).norm() <= (m.to_dense() - exact).norm() * (1 + 1e-9)
    v = nng.PVector.randn(m.layer_collection, 2, dtype=f64)
    for matrix in (m, e):
        full = matrix.to_dense()
        damped = full + 0.1 * torch.eye(len(full), dtype=f64)
        close(matrix.mv(v).flat(), v.flat() @ full)
        close(matrix.solve(v, 0.1).flat(), torch.linalg.solve(damped, v.flat().T).T)
        close(matrix.logdet(0.1), torch.linalg.slogdet(damped)[1])
        close(matrix.eigh()[0], torch.linalg.eigvalsh(full), 1e-7)
        close((matrix + matrix.power(2.0)).solve(v, 0.1).flat(), torch.linalg.solve(damped + full @ full, v.flat().T).T)
        nng.save(matrix, tmp_path / "matrix.safetensors")
        again = nng.load(tmp_path / "matrix.safetensors")
        assert torch.equal(again.to_dense(), full) and again.dropped == matrix.dropped
        scores = nng.influence(model, loader, loader[:1], matrix, loss="cross_entropy", damping=0.1).scores
        rows = nng.GramMatrix(model, loader, loss="cross_entropy", metric=matrix.inverse(0.1)).tensor[0, :, 0]
        close(scores, rows[: len(loader[0][0])], 1e-8)
    layer = next(iter(m.by_layer()))
    close(m[layer].to_dense(), m.to_dense()[: m[layer].shape[0], : m[layer].shape[0]])
    assert e.rescaled(model, loader).dropped == e.dropped
    close(e.rescaled(model, loader).to_dense(), e.to_dense())


def test_tied_tables_say_so():
    case = build("language-model")
    m = nng.FIM(case.model, case.loader, nng.PMatKFAC, factor_limit=4)
    assert any(d.factor == "A" and d.side == 5 for d in m.dropped) and "of A (5)" in repr(m)
    assert "of the factor" in str(
        nng.explain(case.model, case.loader[0], representations=[nng.PMatKFAC.options(factor_limit=4)])
    )


def test_explain_and_count():
    model, loader = setting("plain")
    for form, kept in (("diagonal", "its diagonal"), ("block", "2 diagonal blocks")):
        chosen = nng.PMatKFAC.options(factor_limit=LIMIT, factor_form=form)
        report = nng.explain(model, loader[0], representations={"cut": chosen})
        assert f"of the factor G (24) of 0.weight {kept} is kept: above factor_limit=12" in str(report)
        held = nng.FIM(model, loader, chosen)
        for names in held.layer_collection.by_layer().values():
            blocks = [block for layout, block in held.blocks.items() if set(layout.names) <= set(names)]
            assert report[names[0]].numbers["cut"] == sum(block.a.numel() + block.g.numel() for block in blocks)
    assert not nng.explain(model, loader[0]).notes


def test_errors():
    model, loader = setting("plain")
    for options, match in (
        ({"factor_limit": 0}, "factor_limit is 0"),
        ({"factor_form": "band"}, "factor_form is 'band'"),
        ({"factor_form": ("low_rank", 0)}, "factor_form is .'low_rank', 0."),
        ({"factor_form": ("block", 3)}, "expected one of"),
        ({"factor_form": ("low_rank", 3, 4)}, "expected one of"),
        ({"factor_form": 3}, "factor_form is 3"),
        ({"factor_form": "low_rank", "fit": "nearest"}, "factor_form='diagonal'"),
        ({"factor_form": "block", "fit": "nearest"}, "factor_form='diagonal'"),
    ):
        for kind in (nng.PMatKFAC, nng.PMatEKFAC):
            with pytest.raises(nng.ArgumentError, match=match):
                nng.FIM(model, loader, kind, **options)
    prime = nn.Linear(3, 23).double()
    with pytest.raises(nng.StructureError, match="23 outputs do not fall"):
        nng.FIM(prime, [(torch.randn(4, 3, dtype=f64),)], nng.PMatKFAC, factor_limit=11, factor_form="block")


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_an_optimizer_is_a_solve(form):
    model, loader = setting("plain")
    options, (x, y) = {"factor_limit": LIMIT, "factor_form": form}, loader[0]
    fisher = nng.EmpiricalFIM(model, [(x, y)], nng.PMatKFAC, loss="cross_entropy", **options)
    settings = {"damping": 0.1, "momentum": 0.0, "statistics_decay": 0.0, "kl_clip": None}
    optimizer = nng.optim.NaturalGradient(model, nng.PMatKFAC.options(**options), lr=1.0, **settings)
    before = nng.PVector.from_model(model)
    optimizer.zero_grad()
    with optimizer.observe(reduction="mean"):
        nn.functional.cross_entropy(model(x), y).backward()
    gradient = nng.PVector.from_grad(model)
    optimizer.step()
    close((before - nng.PVector.from_model(model)).flat(), fisher.solve(gradient, 0.1).flat())
    before.copy_to(model)


# -- leading eigenvectors ----------------------------------------------------------------------------------------------


def completed(s, p, r):
    return CompletedBasis.of(torch.linalg.qr(torch.randn(s, p, r, dtype=f64))[0])


@pytest.mark.parametrize("s, p, r", [(1, 30, 7), (2, 9, 8), (1, 20, 1)])
def test_completed_bases(s, p, r):
    torch.manual_seed(0)
    basis = completed(s, p, r)
    q = basis.columns(0, p)
    close(q.mT @ q, torch.eye(p, dtype=f64).expand(s, p, p))
    assert torch.equal(q[..., :r], basis.u)
    x, d = torch.randn(3, s, 4, p, dtype=f64), torch.rand(s, p, 5, dtype=f64)
    close(basis.vectors_of(x), x @ q.mT)
    close(basis.coordinates_of(x), x @ q)
    close(basis.squares_times(d), q.square() @ d)
    close(basis.times_squares(d.mT), d.mT @ q.square())
    if s == 1:
        index = torch.tensor([[0, p - 1], [r, 0]])
        close(basis.rows(index), q[0][index])


def nystroem(f, m):
    """Eigenvalues and the matrix of the Nystroem approximation, by dense pseudo-inverse."""
    w = normal_vectors(len(f), m, f)
    n = f @ w @ torch.linalg.pinv(w.T @ f @ w, hermitian=True) @ w.T @ f
    return n, w


@pytest.mark.parametrize("kind", ["decaying", "flat", "of low rank", "diagonal", "zero"])
def test_sketched_factors(kind):
    torch.manual_seed(1)
    p, m = 40, 9
    u = torch.linalg.qr(torch.randn(p, p, dtype=f64))[0]
    u = torch.eye(p, dtype=f64) if kind == "diagonal" else u
    values = {"flat": 1 + torch.rand(p), "of low rank": (torch.arange(p) < 6).double()}
    values = values.get(kind, torch.logspace(0, -4, p)).double() * (kind != "zero")
    f = (u * values) @ u.T
    n, w = nystroem(f, m)
    found, basis = sketch_eigh(torch.cat([f.diagonal()[:, None], f @ w], 1)[None])
    q = basis.columns(0, p)[0]
    kept = (q * found[0]) @ q.T
    assert bool((found >= 0).all())
    close(kept.trace() + 1, f.trace() + 1)
    if kind == "zero":
        return
    vectors = torch.linalg.eigh(n)[1][:, -(6 if kind == "of low rank" else m) :]
    close(q[:, :m] @ (q[:, :m].T @ vectors), vectors, 1e-5)  # they begin with those of the approximation
    left = f - n
    assert float(torch.linalg.eigvalsh(left).min()) > -1e-9
    outside = 1 - (torch.linalg.qr(w)[0].T @ q[:, :m]).square().sum(0)
    added = outside * left.trace() / (p - m)
    close((q[:, :m] * (found[0, :m] - added)) @ q[:, :m].T, n, 1e-6)
    beyond = (q.T @ torch.diag(left.diagonal()) @ q).diagonal()[m:]
    if kind == "of low rank":
        close(kept, f, 1e-6)
    else:
        close(found[0, m:] / found[0, m:].sum(), beyond / beyond.sum(), 1e-6)
    if kind != "diagonal":  # of equal directions there are none to lead
        room = 1.05 if kind == "flat" else 1.0
        assert (kept - f).norm() <= room * (torch.diag(f.diagonal()) - f).norm()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["plain", "positions"])
def test_leading_eigenvectors_of_factors(kind, sharing):
    model, loader = setting(kind)
    whole = nng.FIM(model, loader, nng.PMatKFAC, sharing=sharing)
    m = nng.FIM(model, loader, nng.PMatKFAC, sharing=sharing, factor_limit=LIMIT, factor_form="low_rank")
    said = {(d.parameters[0], d.factor): d for d in m.dropped}
    assert said and all(d.form == "low_rank" for d in said.values())
    for layout, block in whole.blocks.items():
        mine = m.blocks[layout]
        for side, exact in zip("AG", (x[0] for x in dense(block))):
            if (layout.names[0], side) not in said:
                continue
            values, basis = (getattr(mine, f"{name}{side.lower()}") for name in "su")
            assert basis.rank == LIMIT**2 // len(exact) or basis.rank == len(exact) - 2
            q = basis.columns(0, len(exact))[0]
            kept, d = (q * values[0]) @ q.T, said[layout.names[0], side]
            close(kept.trace(), exact.trace())
            share = float((exact - kept).norm() / exact.norm())
            assert abs(d.share - share) <= 4 * d.standard_error + 1e-6 and d.side == len(exact)
            assert f"of {side} ({len(exact)}) of {layout.names[0]} leading eigenvectors" in repr(m)
    closer = nng.FIM(model, loader, nng.PMatKFAC, sharing=sharing, factor_limit=LIMIT)
    assert (m.to_dense() - whole.to_dense()).norm() < (closer.to_dense() - whole.to_dense()).norm()


def test_all_eigenvectors_are_the_factor():
    """A factor of lower rank than there are vectors is kept whole."""
    model, loader = setting("plain")
    few = [(loader[0][0][:1], loader[0][1][:1])]
    whole = nng.EmpiricalFIM(model, few, nng.PMatKFAC, loss="cross_entropy")
    m = nng.EmpiricalFIM(model, few, nng.PMatKFAC, loss="cross_entropy", factor_limit=LIMIT, factor_form="low_rank")
    close(m.to_dense(), whole.to_dense(), 1e-6)
    assert all(d.share < 1e-6 for d in m.dropped)


def test_factored_dampings_of_low_rank():
    model, loader = setting("plain")
    m = nng.FIM(model, loader, nng.PMatKFAC, factor_limit=LIMIT, factor_form="low_rank")
    for layout, block in m.blocks.items():
        if not hasattr(block, "sa"):
            continue
        a, g = (u if u.ndim == 3 else torch.diag_embed(u) for u in (factor(block, "a"), factor(block, "g")))
        plain = nng.pmat.KroneckerBlock(a, g)
        for damping in (nng.FactoredTikhonov(0.1), nng.FactoredTikhonov(0.1, balanced=False)):
            close(block.inverse(damping).dense(), plain.inverse(damping).dense(), 1e-8)
        one = nng.PMatKFAC.of_blocks(m[list(layout.names)].layer_collection, m[list(layout.names)].blocks, 1)
        other = nng.PMatKFAC.of_blocks(one.layer_collection, {next(iter(one.blocks)): plain}, 1)
        for damping in (nng.Relative(0.1), nng.Relative(0.1, factored=True), nng.Cutoff(top=7)):
            close(one.inverse(damping).to_dense(), other.inverse(damping).to_dense(), 1e-8)
        for p in (0.5, 2.0, -1.0):
            if p > 0 or float(other.eigh()[0].min()) > 1e-9:
                close(one.power(p).to_dense(), other.power(p).to_dense(), 1e-7)
        for f in (lambda x: x.norm(2), lambda x: x.norm(), lambda x: x.trace(), lambda x: x.diag().flat()):
            close(f(one), f(other), 1e-8)
        sums = [(x + 2.0 * nng.PMatDiag.from_vector(x.diag())) - 0.5 * other for x in (one, other)]
        close(sums[0].to_dense(), sums[1].to_dense(), 1e-8)
        close(sums[0].norm(), sums[1].norm(), 1e-8)
        close((one + 0.5 * one).to_dense(), 1.5 * other.to_dense(), 1e-8)
        with pytest.raises(nng.StructureError, match="no Kronecker product"):
            one.factors()


@pytest.mark.parametrize("form", ["low_rank", ("low_rank", 3)])
@pytest.mark.parametrize("kind", ["plain", "positions"])
def test_merged(kind, form):
    """Near to what one sweep over all data keeps, and it says how near."""
    model, loader = setting(kind)
    measured = lambda data, **options: nng.FIM(model, data, nng.PMatKFAC, **options)
    low, exact = {"factor_limit": LIMIT, "factor_form": form}, measured(loader)
    parts, truth = [measured([batch], **low) for batch in loader], exact.to_dense()
    m = nng.merge(*parts)
    assert m.examples == exact.examples
    close(m.trace(), exact.trace())
    error = lambda x: float((x.to_dense() - truth).norm())
    assert error(m) < error(measured(loader, factor_limit=LIMIT))
    said = {(d.parameters[0], d.factor): d for d in m.dropped}
    assert said and all(d.form == "low_rank" for d in said.values())
    for layout, block in exact.blocks.items():
        for side, whole in zip("AG", (x[0] for x in dense(block))):
            if (d := said.get((layout.names[0], side))) is not None:
                kept = factor(m.blocks[layout], side.lower())
                kept = torch.diag_embed(kept)[0] if kept.ndim == 2 else kept[0]
                close(kept.trace(), whole.trace())
                share = float((whole - kept).norm() / whole.norm())
                assert share <= d.share + 4 * d.standard_error + 1e-6 <= 1.5 * share + 0.2
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    close(((m @ (x := m.solve(v, 0.1))) + 0.1 * x).flat(), v.flat())
    weighted = nng.merge(*parts, weights=[1.0, 3.0])
    expected = nng.merge(*[measured([batch]) for batch in loader], weights=[1.0, 3.0])
    close(weighted.trace(), expected.trace())
    with pytest.raises(nng.StructureError, match="on all data at once"):
        nng.merge(
            *[measured([b], factor_limit=limit, factor_form=("low_rank", 3)) for b, limit in zip(loader, (12, 20))]
        )


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("form", ["diagonal", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_merged_factors_drop(kind, form, sharing):
    """What both drop, added up: an upper bound of what their mean does."""
    model, loader = setting(kind)
    options = {"sharing": sharing, "factor_limit": LIMIT, "factor_form": form}
    wholes = [nng.FIM(model, [batch], nng.PMatKFAC, sharing=sharing) for batch in loader]
    parts = [nng.FIM(model, [batch], nng.PMatKFAC, **options) for batch in loader]
    shares = [0.25, 0.75]
    m = nng.merge(*parts, weights=shares)
    said = {(d.parameters[0], d.factor): d for d in m.dropped}
    assert said.keys() == {(d.parameters[0], d.factor) for d in parts[0].dropped}
    assert all(d.side == e.side and d.form == e.form for d, e in zip(m.dropped, parts[0].dropped))
    mean = nng.merge(*wholes, weights=shares)
    for layout in mean.blocks:
        for side in "AG":
            if (d := said.get((layout.names[0], side))) is None:
                continue
            factors = [dense(w.blocks[layout])["AG".index(side)][0] for w in (*wholes, mean)]
            bias = side == "A" and len(layout.names) > 1
            kept = [cut_inputs(f, form, bias=bias) for f in factors]
            lost = [float((f - k).norm()) for f, k in zip(factors, kept)]
            most = shares[0] * lost[0] + shares[1] * lost[1]
            bound = most / (float(kept[2].norm()) ** 2 + most**2) ** 0.5
            assert lost[2] / float(factors[2].norm()) <= bound + 1e-12
            assert abs(d.share - bound) <= 4 * d.standard_error + 1e-9 and d.standard_error < 0.3


@pytest.mark.parametrize("form", ["diagonal", "block", "low_rank"])
def test_merged_eigenbases_say_what_was_dropped(form):
    model, loader = setting("plain")
    e = nng.FIM(model, loader, nng.PMatEKFAC, factor_limit=LIMIT, factor_form=form)
    parts = [e.rescaled(model, [batch]) for batch in loader]
    merged = nng.merge(*parts)
    assert merged.dropped == e.dropped != ()
    close(merged.to_dense(), e.to_dense())


def test_merged_factors_of_unlike_uses():
    """Whose own factors the joined ones do not tell: no less than one sweep over all data says."""
    case = build("language-model")
    m = nng.merge(*(nng.FIM(case.model, [b], nng.PMatKFAC, factor_limit=4) for b in case.loader))
    exact = nng.FIM(case.model, case.loader, nng.PMatKFAC, factor_limit=4)
    assert len(m.dropped) == len(exact.dropped) > 0
    for mine, theirs in zip(m.dropped, exact.dropped):
        assert (mine.parameters, mine.factor, mine.side) == (theirs.parameters, theirs.factor, theirs.side)
        assert theirs.share - 4 * theirs.standard_error <= mine.share + 4 * mine.standard_error < 2


def factor(block, side):
    u, values = getattr(block, f"u{side}"), getattr(block, f"s{side}")
    q = u.columns(0, values.shape[1]) if isinstance(u, CompletedBasis) else u
    return torch.diag_embed(values) if q is None else (q * values.unsqueeze(-2)) @ q.mT


@pytest.mark.parametrize("kind", [nng.PMatKFAC, nng.PMatEKFAC])
def test_tables_that_are_heads_too(kind):
    """The factor of the tokens is that of lookups and of outputs together."""
    case = build("language-model")
    whole = nng.FIM(case.model, case.loader, kind)
    m = nng.FIM(case.model, case.loader, kind, factor_limit=4, factor_form=("low_rank", 3))
    assert any(d.form == "low_rank" for d in m.dropped)
    exact = nng.FIM(case.model, case.loader, nng.PMatDense)
    if kind is nng.PMatEKFAC:
        close(m.trace(), exact.trace())
    else:
        close(m.trace(), whole.trace())
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    full = m.to_dense()
    close(m.mv(v).flat(), full @ v.flat())
    damped = full + 0.1 * torch.eye(len(full), dtype=f64)
    close(m.solve(v, 0.1).flat(), torch.linalg.solve(damped, v.flat()))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("kind", [nng.PMatKFAC, nng.PMatEKFAC])
def test_heads_without_columns(kind, likelihood):
    """Where the metric of the outputs is known no column of its root is formed: the same as with all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 40)).double()
    loader = [(torch.randn(n, 3, dtype=f64),) for n in (5, 3)]
    options = {"likelihood": likelihood, "factor_limit": 20, "factor_form": ("low_rank", 6)}
    m = nng.FIM(model, loader, kind, **options)
    rows = nng.FIM(model, loader, kind, function=lambda x: model(x).flip(1).flip(1), **options)
    close(m.to_dense(), rows.to_dense(), 1e-7)
    (mine,), (theirs,) = m.dropped, rows.dropped
    assert mine.form == theirs.form == "low_rank" and abs(mine.share - theirs.share) < 1e-6
    diagonal, said = (nng.FIM(model, loader, kind, likelihood=likelihood, factor_limit=20).dropped for _ in range(2))
    assert [d.form for d in diagonal] == ["diagonal"] and diagonal == said


def test_kept_in_training(tmp_path):
    model, loader = setting("plain")
    low = {"factor_limit": LIMIT, "factor_form": "low_rank"}
    with pytest.raises(nng.UnsupportedError, match="not followed in training"):
        optimizer = nng.optim.NaturalGradient(model, nng.PMatEKFAC.options(**low), lr=0.1)
        with optimizer.observe():
            nn.functional.cross_entropy(model(loader[0][0]), loader[0][1]).backward()
        optimizer.step()
    optimizer = nng.optim.NaturalGradient(model, nng.PMatKFAC.options(**low), lr=0.0, damping=nng.FactoredTikhonov(0.1))
    with optimizer.observe():
        nn.functional.cross_entropy(model(loader[0][0]), loader[0][1]).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = nng.optim.NaturalGradient(model, nng.PMatKFAC.options(**low), lr=0.0, damping=nng.FactoredTikhonov(0.1))
    again.load_state_dict(state)


def test_damaged_bases_in_files(tmp_path):
    basis = completed(1, 6, 2)
    for wrong in (CompletedBasis(basis.u, basis.k[:, :1], basis.c), CompletedBasis(basis.u[0], basis.k, basis.c)):
        with pytest.raises(nng.FileError, match="a basis has"):
            nngeom_checks.require_fit(wrong)
