"""Traces, diagonals and log-determinants from products with random vectors: unbiased, exact at low rank, calibrated."""

import pytest
import torch
from cases import build
from test_lanczos import matrix_of

import nngeom as nng
from nngeom.core import memory
from nngeom.solve.hutchinson import hutchinson_diagonal
from nngeom.solve.leave_one_out import DIAGONALS, TRACES, xdiag, xtrace
from nngeom.solve.slq import slq_logdet, spectral_density

f64 = torch.float64
D = 60
LIKE = torch.zeros((), dtype=f64)
DECAYING = matrix_of(0.8 ** torch.arange(D, dtype=f64), seed=2)
FLAT = matrix_of(torch.linspace(1, 3, D, dtype=f64), seed=3)
SIGNED = matrix_of(torch.linspace(-2, 3, D, dtype=f64), seed=4)
REPEATS = 400


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draws(estimator, m, samples):
    """Values and standard errors of many independent estimates."""
    found = [estimator(lambda x: x @ m, D, samples, LIKE, seeded(j)) for j in range(REPEATS)]
    return torch.stack([e.value for e in found]), torch.stack([e.standard_error for e in found])


@pytest.mark.parametrize("m", [DECAYING, FLAT, SIGNED], ids=["decaying", "flat", "signed"])
@pytest.mark.parametrize("name", TRACES)
def test_traces_are_unbiased_and_their_errors_calibrated(name, m):
    values, errors = draws(TRACES[name], m, 20)
    spread = values.std()
    assert abs(values.mean() - m.trace()) < 4 * spread / REPEATS**0.5
    assert 0.6 < errors.square().mean().sqrt() / spread < 1.7


@pytest.mark.parametrize("m", [DECAYING, FLAT, SIGNED], ids=["decaying", "flat", "signed"])
@pytest.mark.parametrize("name", DIAGONALS)
def test_diagonals_are_unbiased_and_their_errors_calibrated(name, m):
    values, errors = draws(DIAGONALS[name], m, 20)
    spread = values.std(0)
    assert bool(((values.mean(0) - m.diagonal()).abs() < 4.5 * spread / REPEATS**0.5).all())
    ratio = errors.square().mean(0).sqrt() / spread
    assert bool((ratio > 0.5).all()) and bool((ratio < 2).all())


def test_the_new_estimators_are_closer_where_the_spectrum_decays():
    for old, new in ((TRACES["hutchinson"], xtrace), (TRACES["hutch++"], xtrace), (hutchinson_diagonal, xdiag)):
        spread = [draws(f, DECAYING, 24)[0].std(0).mean() for f in (old, new)]
        assert spread[1] < 0.75 * spread[0]


@pytest.mark.parametrize("rank", [0, 1, 5, 9])
def test_low_ranks_are_exact(rank):
    values = torch.zeros(D, dtype=f64)
    values[:rank] = torch.arange(1, rank + 1, dtype=f64)
    m = matrix_of(values)
    for estimator, truth in ((xtrace, m.trace()), (xdiag, m.diagonal())):
        e = estimator(lambda x: x @ m, D, 20, LIKE, seeded(0))
        torch.testing.assert_close(e.value, truth, rtol=1e-9, atol=1e-9)
        assert float(e.standard_error.max()) < 1e-8


@pytest.mark.parametrize("samples", [2 * D - 2, 2 * D, 4 * D])
def test_samples_as_many_as_the_side_and_more(samples):
    e = xtrace(lambda x: x @ FLAT, D, samples, LIKE, seeded(0))
    assert abs(e.value - FLAT.trace()) < 1e-6 + 5 * e.standard_error
    e = xdiag(lambda x: x @ FLAT, D, samples, LIKE, seeded(0))
    assert bool(((e.value - FLAT.diagonal()).abs() < 1e-6 + 5 * e.standard_error).all())


def test_in_single_precision():
    m = DECAYING.float()
    e = xtrace(lambda x: x @ m, D, 30, LIKE.float(), seeded(0))
    assert e.value.dtype == torch.float32 and abs(e.value - m.trace()) < 5 * e.standard_error + 1e-4


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_log_determinants_are_calibrated(damping):
    truth = torch.logdet(FLAT + damping * torch.eye(D, dtype=f64))
    found = [slq_logdet(lambda x: x @ FLAT, D, LIKE, damping, 30, 10, seeded(j)) for j in range(100)]
    values, errors = (torch.stack([getattr(e, f) for e in found]) for f in ("value", "standard_error"))
    assert abs(values.mean() - truth) < 4 * values.std() / 10
    assert 0.7 < errors.square().mean().sqrt() / values.std() < 1.5


def test_too_few_steps_show_in_the_error():
    """The quadrature is biased then, by about what its later steps still change."""
    m = matrix_of(torch.logspace(-4, 0, D, dtype=f64))
    e = slq_logdet(lambda x: x @ m, D, LIKE, 1e-5, 8, 1000, seeded(0))
    truth = torch.logdet(m + 1e-5 * torch.eye(D, dtype=f64))
    assert abs(e.value - truth) < 3 * e.standard_error and abs(e.value - truth) > 1


def test_log_determinants_of_singular_and_indefinite_matrices():
    low = matrix_of(torch.cat([torch.ones(5, dtype=f64), torch.zeros(D - 5, dtype=f64)]))
    truth = (D - 5) * torch.tensor(0.1, dtype=f64).log() + 5 * torch.tensor(1.1, dtype=f64).log()
    e = slq_logdet(lambda x: x @ low, D, LIKE, 0.1, 20, 50, seeded(0))
    assert abs(e.value - truth) < 4 * e.standard_error
    for m, damping in ((low, 0.0), (SIGNED, 1.0)):
        with pytest.raises(nng.SingularError, match="larger damping"):
            slq_logdet(lambda x, m=m: x @ m, D, LIKE, damping, 60, 4, seeded(0))


def test_densities_do_not_depend_on_the_budget():
    whole = spectral_density(lambda x: x @ SIGNED, D, LIKE, 20, 6, seeded(0))
    with memory.limit(1):
        pieces = spectral_density(lambda x: x @ SIGNED, D, LIKE, 20, 6, seeded(0))
    torch.testing.assert_close(whole.nodes, pieces.nodes)
    torch.testing.assert_close(whole.weights.sum(), torch.ones((), dtype=f64))
    for power in (1, 2, 3):
        moment = whole.expectation(lambda t, p=power: t**p)
        assert abs(moment - torch.linalg.matrix_power(SIGNED, power).trace() / D) < 1.0


def test_bad_arguments():
    act = lambda x: x
    with pytest.raises(nng.ArgumentError, match="samples is 3; expected at least 4"):
        xtrace(act, D, 3, LIKE)
    with pytest.raises(nng.ArgumentError, match="samples is 0; expected at least 1"):
        hutchinson_diagonal(act, D, 0, LIKE)
    with pytest.raises(nng.ArgumentError, match="steps is 0"):
        spectral_density(act, D, LIKE, 0)


# -- of matrices and kernels -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects():
    """An implicit matrix, an implicit kernel, and their entries."""
    c = build("mlp")
    m, k = nng.FIM(c.model, c.loader, nng.PMatImplicit), nng.GramMatrix(c.model, c.loader, nng.FMatImplicit)
    return [(m, m.to_dense()), (k, k.to_dense())]


def flat(x):
    return x.flat() if isinstance(x, nng.PVector) else x.tensor.flatten()


@pytest.mark.parametrize("which", [0, 1], ids=["matrix", "kernel"])
def test_estimates_of_implicit_objects(objects, which):
    m, dense = objects[which]
    for name in TRACES:
        e = m.trace(estimator=name, samples=30, generator=seeded(0))
        assert abs(float(e) - float(dense.trace())) < 4 * float(e.standard_error) + 1e-9
    for name in DIAGONALS:
        e = m.diag(estimator=name, samples=40, generator=seeded(0))
        assert type(e.value) is type(e.standard_error) is type(m.diag())
        assert bool(((flat(e.value) - dense.diagonal()).abs() <= 5 * flat(e.standard_error) + 1e-9).all())
    torch.testing.assert_close(flat(m.diag()), dense.diagonal())
    e = m.logdet(0.1, estimator="slq", samples=40, generator=seeded(0))
    truth = torch.logdet(dense + 0.1 * torch.eye(len(dense), dtype=f64))
    assert abs(e.value - truth) < 4 * e.standard_error
    e = (2 * m).logdet(torch.tensor(0.2), estimator="slq", samples=40, generator=seeded(0))
    assert abs(e.value - truth - len(dense) * torch.tensor(2.0).log()) < 4 * e.standard_error + 1e-6


@pytest.mark.parametrize("which", [0, 1], ids=["matrix", "kernel"])
def test_bad_estimators(objects, which):
    m, _ = objects[which]
    for f in (m.trace, m.diag):
        with pytest.raises(nng.ArgumentError, match=r"estimator is 'mean'; expected one of .* or None for the exact"):
            f(estimator="mean")
    with pytest.raises(nng.UnsupportedError, match="slq"):
        m.logdet(0.1)
    with pytest.raises(nng.ArgumentError, match="expected 'slq'"):
        m.logdet(0.1, estimator="mean")
    with pytest.raises(nng.ArgumentError, match="without gradient"):
        m.logdet(torch.tensor(0.1, requires_grad=True), estimator="slq")
    with pytest.raises(nng.ArgumentError, match="takes a number"):
        m.logdet(nng.Cutoff(0.1), estimator="slq")
    with pytest.raises(nng.DampingError):
        m.logdet(-1.0, estimator="slq")


def test_kernels_between_two_sets_have_no_such_estimates():
    c = build("mlp")
    k = nng.GramMatrix(c.model, c.loader, nng.FMatImplicit, other=c.loader)
    refused = (lambda: k.trace("xtrace"), lambda: k.diag("xdiag"), lambda: k.logdet(1.0, "slq"), lambda: k.lanczos(1))
    for f in refused:
        with pytest.raises(nng.ArgumentError, match="symmetric kernel"):
            f()
