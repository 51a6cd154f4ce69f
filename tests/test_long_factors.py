"""Factors above a side limit: what is kept of them, what is said of what is not, and the algebra of what is."""

import functools

import pytest
import torch
from cases import build
from torch import nn

import nngeom as nng
from nngeom.core import linalg

f64 = torch.float64
LIMIT = 12


@functools.cache
def setting(kind):
    torch.manual_seed(0)
    if kind == "positions":
        model = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 16), nn.Flatten(1), nn.Linear(48, 4))
        batches = [(torch.randn(n, 3, 5, dtype=f64), torch.randint(0, 4, (n,))) for n in (5, 4)]
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


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("form", ["diagonal", "block"])
@pytest.mark.parametrize("kind", ["plain", "positions"])
def test_what_is_kept(kind, form, sharing):
    model, loader = setting(kind)
    whole = nng.FIM(model, loader, nng.PMatKFAC, sharing=sharing)
    m = nng.FIM(model, loader, nng.PMatKFAC, sharing=sharing, factor_limit=LIMIT, factor_form=form)
    by_name = {block_layout.names[0]: block for block_layout, block in m.blocks.items()}
    said = {(d.parameters[0], d.factor): d for d in m.dropped}
    for layout, block in whole.blocks.items():
        name = layout.names[0]
        a, g = (x[0] for x in dense(block))
        kept_a, kept_g = (f for f in dense(by_name[name]))
        close(kept_a[0], cut(a, "diagonal"))  # blocks are of outputs
        close(torch.block_diag(*kept_g), cut(g, form))
        for side, exact, kept in (("A", a, cut(a, "diagonal")), ("G", g, cut(g, form))):
            assert ((name, side) in said) == (len(exact) > LIMIT)
            if (name, side) in said:
                d, share = said[name, side], float((exact - kept).norm() / exact.norm())
                assert d.side == len(exact) and d.form == (form if side == "G" else "diagonal")
                assert abs(d.share - share) <= 4 * d.standard_error + 1e-9 and d.standard_error < 0.5
                assert f"of {side} ({len(exact)}) of {name}" in repr(m)
    assert not whole.dropped and "kept" not in repr(whole)


@pytest.mark.parametrize("form", ["diagonal", "block"])
@pytest.mark.parametrize("kind", ["plain", "positions"])
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
        numbers = {report[layout.names[0]].numbers["cut"]: block for layout, block in held.blocks.items()}
        assert all(n == block.a.numel() + block.g.numel() for n, block in numbers.items())
    assert not nng.explain(model, loader[0]).notes


def test_errors():
    model, loader = setting("plain")
    for options, match in (
        ({"factor_limit": 0}, "factor_limit is 0"),
        ({"factor_form": "band"}, "factor_form is 'band'"),
        ({"factor_form": "block", "fit": "nearest"}, "factor_form='diagonal'"),
    ):
        for kind in (nng.PMatKFAC, nng.PMatEKFAC):
            with pytest.raises(nng.ArgumentError, match=match):
                nng.FIM(model, loader, kind, **options)
    prime = nn.Linear(3, 23).double()
    with pytest.raises(nng.StructureError, match="23 outputs do not fall"):
        nng.FIM(prime, [(torch.randn(4, 3, dtype=f64),)], nng.PMatKFAC, factor_limit=11, factor_form="block")


@pytest.mark.parametrize("form", ["diagonal", "block"])
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
