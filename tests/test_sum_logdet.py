"""Estimated log-determinants of large sums: against dense ones, with standard errors that hold."""

import functools

import pytest
import torch
from cases import build
from torch import nn

import nngeom as nng
from nngeom.solve.hutchinson import Estimate

f64 = torch.float64


@pytest.fixture(autouse=True)
def estimated(monkeypatch):
    """Blocks as small as those here are estimated too."""
    monkeypatch.setattr("nngeom.pmat.sum_logdet.FACTORED", 0)


@functools.cache
def matrices():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(22, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    tasks = [[(torch.randn(30, 22, dtype=f64) * torch.rand(22, dtype=f64),)] for _ in range(3)]
    kinds = (nng.PMatKFAC, nng.PMatKFAC, nng.PMatEKFAC, nng.PMatDiag)
    f, g, e, d = (nng.FIM(model, tasks[j % 3], kind) for j, kind in enumerate(kinds))
    rows = nng.FIM(model, tasks[0], nng.PMatLowRank)
    few = nng.FIM(model, [(tasks[0][0][0][:3],)], nng.PMatLowRank)
    implicit = nng.FIM(model, tasks[0], nng.PMatImplicit)
    return {"two": f + g, "with eigenbasis": f + e, "with diagonal": 2.0 * f + d, "three": f + g + e,
            "rows": f + g + rows, "few rows": f + g + few, "implicit": d + implicit}  # fmt: skip


def exact(m, x):
    dense = m.to_dense()
    return torch.linalg.slogdet(dense + x * torch.eye(len(dense), dtype=f64))[1]


@pytest.mark.parametrize("damping", [1e-3, 0.1, torch.tensor(0.05, dtype=f64)])
@pytest.mark.parametrize("name", ["two", "with eigenbasis", "with diagonal", "three", "rows", "few rows", "implicit"])
def test_estimates(name, damping):
    m = matrices()[name]
    steps = 64 if name == "implicit" else 16
    found = [
        m.logdet(damping, estimator="slq", steps=steps, generator=torch.Generator().manual_seed(s))
        for s in range(2 if name == "implicit" else 6)
    ]
    errors = torch.stack([(e.value - exact(m, float(damping))) / e.standard_error for e in found])
    assert isinstance(found[0], Estimate) and bool((errors.abs() < 5).all())
    assert float(errors.square().mean()) < 6
    assert all(float(e.standard_error) < 0.02 * abs(float(e)) for e in found)
    assert float(m.logdet(damping, estimator="slq", steps=steps, generator=torch.Generator().manual_seed(0))) == float(
        found[0]
    )


def test_closed_blocks_have_no_error():
    m = matrices()["two"]
    inner = m["2"]
    found = inner.logdet(0.1, estimator="slq")
    assert float(found.standard_error) == 0
    torch.testing.assert_close(found.value, inner.logdet(0.1))


def test_more_samples_are_nearer():
    m = matrices()["with diagonal"]
    few, many = (
        m.logdet(1e-3, estimator="slq", samples=k, tol=0.0, generator=torch.Generator().manual_seed(0))
        for k in (4, 256)
    )
    assert float(many.standard_error) < float(few.standard_error)


def counted(m, monkeypatch, **options):
    """The estimate, and how many vectors the sum is multiplied with."""
    from nngeom.solve import log_trace

    seen, growing = [], log_trace.growing

    def watched(product, start, steps):
        return growing(lambda x: seen.append(len(x)) or product(x), start, steps)

    monkeypatch.setattr(log_trace, "growing", watched)
    options = {"estimator": "slq", "generator": torch.Generator().manual_seed(1), **options}
    return m.logdet(1e-2, **options), sum(seen)


def test_no_more_products_than_asked_for(monkeypatch):
    m = matrices()["with diagonal"]
    (rough, few), (fine, many) = (counted(m, monkeypatch, tol=tol) for tol in (1e-2, 1e-4))
    d = m.shape[0]
    assert few < many and float(rough.standard_error) <= 1e-2 * d and float(fine.standard_error) <= 1e-4 * d
    two, least = counted(matrices()["two"], monkeypatch)
    assert least <= 8 * 6 and float(two.standard_error) < 1e-5 * d
    assert abs(float(two) - float(exact(matrices()["two"], 1e-2))) < 5 * float(two.standard_error)


@pytest.mark.parametrize("kind", ["grouped", "long", "tied", "identity"])
def test_blocks_of_other_shapes(kind, monkeypatch):
    """Groups, factors by eigenvectors, diagonal factors, and the identity beside."""
    monkeypatch.setattr("nngeom.pmat.sum_logdet.ITERATED", 1)
    case = build({"grouped": "conv2d", "tied": "language-model"}.get(kind, "mlp"), sizes=(3, 4))
    low = {"factor_limit": 4, "factor_form": "low_rank"} if kind == "long" else {}
    f = nng.FIM(case.model, case.loader, nng.PMatKFAC, **low)
    e, d = (nng.FIM(case.model, case.loader[:1], kind) for kind in (nng.PMatEKFAC, nng.PMatDiag))
    eye = nng.PMatEye.build(f.layer_collection, 0.3, dtype=f64)
    for m in (f + e, f + d, e + d + f, f + 2.0 * e + eye) if kind != "identity" else (f + nng.FIM(
        case.model, case.loader[:1], nng.PMatKFAC) + eye,):  # fmt: skip
        x = 0.05
        found = m.logdet(x, estimator="slq", generator=torch.Generator().manual_seed(0))
        assert abs(float(found) - float(exact(m, x))) <= 5 * float(found.standard_error) + 1e-9


def test_small_blocks_are_factorised_where_few_signs_do_not_do(monkeypatch):
    monkeypatch.setattr("nngeom.pmat.sum_logdet.FACTORED", 768)
    m = matrices()["with diagonal"]
    exactly, roughly = (m.logdet(1e-3, estimator="slq", tol=tol) for tol in (0.0, 1.0))
    assert float(exactly.standard_error) == 0 < float(roughly.standard_error)
    torch.testing.assert_close(exactly.value, exact(m, 1e-3))
    assert abs(float(roughly) - float(exact(m, 1e-3))) <= 5 * float(roughly.standard_error)


def test_single_precision():
    m = matrices()["two"]
    single = m.to(torch.float32)
    found = single.logdet(1e-3, estimator="slq", generator=torch.Generator().manual_seed(0))
    assert found.value.dtype == torch.float32
    assert abs(float(found) - float(exact(single.to(f64), 1e-3))) <= 5 * float(found.standard_error)
    assert float(found.standard_error) < 1e-4 * abs(float(found))


def test_differences_that_are_definite():
    """Where parts do not tell that the sum is, all steps are taken."""
    m = matrices()["two"]
    difference = m - 0.5 * m.parts[1] - 0.6 * matrices()["with eigenbasis"].parts[1]
    dense = difference.to_dense()
    x = 0.1 - float(torch.linalg.eigvalsh(dense).min())
    found = difference.logdet(x, estimator="slq", generator=torch.Generator().manual_seed(0))
    assert abs(float(found) - float(exact(difference, x))) <= 5 * float(found.standard_error)


def test_two_steps_say_how_little_they_know():
    m = matrices()["with diagonal"]
    found = m.logdet(1e-4, estimator="slq", steps=2, generator=torch.Generator().manual_seed(0))
    assert abs(float(found) - float(exact(m, 1e-4))) <= 5 * float(found.standard_error)


@pytest.mark.parametrize("name", ["with diagonal", "three", "rows", "implicit", "difference"])
def test_ends_of_the_spectrum(name):
    m = matrices()["three"] - 4.0 * matrices()["two"].parts[1] if name == "difference" else matrices()[name]
    which = "both" if name == "difference" else "largest"
    values, vectors = m.lanczos(4, which, generator=torch.Generator().manual_seed(0))
    every = torch.linalg.eigvalsh(m.to_dense())
    expected = every.flip(0)[:4] if which == "largest" else torch.cat([every.flip(0)[:2], every[:2].flip(0)])
    largest = float(every.abs().max())
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6 * largest)
    residual = (m @ vectors).flat() - values[:, None] * vectors.flat()
    assert float(residual.norm(dim=-1).max()) < 2e-6 * largest
    density = m.spectral_density(steps=8, samples=6, generator=torch.Generator().manual_seed(0))
    mean = float(density.expectation(lambda x: x))
    assert mean == pytest.approx(float(m.trace()) / m.shape[0], rel=0.3)


def test_errors():
    m = matrices()
    with pytest.raises(nng.ArgumentError, match="expected 'slq'"):
        m["two"].logdet(0.1, estimator="xtrace")
    with pytest.raises(nng.SingularError):
        (m["two"] - 3.0 * m["two"].parts[1]).logdet(1e-3, estimator="slq")
    with pytest.raises(nng.ArgumentError):
        m["two"].logdet(nng.Cutoff(0.1), estimator="slq")
    learned = torch.tensor(0.1, dtype=f64, requires_grad=True)
    with pytest.raises(nng.ArgumentError, match="no gradient in the damping"):
        m["two"].logdet(learned, estimator="slq")
    for bad, word in (
        ({"steps": 1}, "steps"),
        ({"samples": 1}, "samples"),
        ({"tol": -1.0}, "tol"),
        ({"tol": "a"}, "tol"),
    ):
        with pytest.raises(nng.ArgumentError, match=f"{word} is"):
            m["two"].logdet(0.1, estimator="slq", **bad)
    product = nng.FIM(*small(), nng.PMatKFAC) @ nng.FIM(*small(), nng.PMatDiag)
    with pytest.raises(nng.UnsupportedError, match="not symmetric"):
        (product + nng.FIM(*small(), nng.PMatDiag)).lanczos(1)
    with pytest.raises(nng.SizeError, match="estimates it"):
        m["two"].logdet(0.1, limit=100)
    with pytest.raises(nng.SizeError, match=r"lanczos\(k\)"):
        m["two"].eigh(limit=100)


def small():
    model = nn.Linear(2, 2).double()
    return model, [(torch.randn(4, 2, dtype=f64),)]
