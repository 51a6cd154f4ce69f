"""Random probes of very many outputs: unbiased, standard errors that are right, and draws that do not depend on
batches.
"""

import pytest
import torch
from cases import PARAMETER_SPACE, build, representation
from cases.outputs import LOSSES, SAMPLED, problem, ragged
from torch import nn

import nngeom as nng

seeded = lambda seed: torch.Generator().manual_seed(seed)


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()) + 1e-14)


def within(estimate, truth, errors=4.5):
    """The estimate is off by no more than some of its standard errors."""
    value, error = (x.flat() if isinstance(x, nng.PVector) else x for x in (estimate.value, estimate.standard_error))
    truth = truth.flat() if isinstance(truth, nng.PVector) else truth
    assert bool(((value - truth).abs() <= errors * error + 1e-12 * truth.abs().max()).all())


@pytest.mark.parametrize("name", SAMPLED)
def test_fisher_is_unbiased(name):
    kind, likelihood = SAMPLED[name]
    model, x, y = problem(kind)
    exact = nng.FIM(model, (x, y), nng.PMatDense, likelihood=likelihood)
    m = nng.FIM(
        model,
        ragged(x, y),
        nng.PMatDense,
        likelihood=likelihood,
        estimator="rademacher",
        samples=400,
        generator=seeded(0),
    )
    v = nng.PVector.randn(exact.layer_collection, 5, generator=seeded(1), dtype=torch.float64)
    within(m.trace(), exact.trace())
    within(m.diag(), exact.diag())
    within(m.vTMv(v), exact.vTMv(v))
    within(m.mv(v), exact.mv(v))
    assert float((m.matrix.to_dense() - exact.to_dense()).norm() / exact.norm()) < 0.25
    assert len(m.draws) == 400 and m.matrix.examples == len(x)


@pytest.mark.parametrize("name", LOSSES)
def test_gauss_newton_is_unbiased(name):
    kind, loss, _ = LOSSES[name]
    model, x, y = problem(kind)
    exact = nng.GGN(model, (x, y), nng.PMatDense, loss=loss)
    m = nng.GGN(model, ragged(x, y), nng.PMatDense, loss=loss, estimator="rademacher", samples=300, generator=seeded(0))
    within(m.trace(), exact.trace())
    within(m.diag(), exact.diag())


@pytest.mark.parametrize("name", SAMPLED)
def test_second_moment_of_the_probes_is_the_information_of_the_outputs(name):
    """Over all patterns of signs, not some: ``E[u u^T] = L L^T`` to rounding."""
    kind, likelihood = SAMPLED[name]
    model, x, y = problem(kind)
    f, y = model(x).detach()[:1], y[:1]
    likelihood = nng.FIM.__globals__["as_likelihood"](likelihood).fit(f, y)
    sizes = []
    likelihood.root_times(f, lambda *size: sizes.append(size) or torch.zeros(1, 1, *size, dtype=f.dtype), y)
    unit = torch.eye(torch.Size(sizes[0]).numel(), dtype=f.dtype).view(-1, 1, *sizes[0])  # L itself, column by column
    root = likelihood.root_times(f, lambda *size: unit, y).flatten(1)
    v = torch.randn(3, *f.shape, dtype=f.dtype)
    expected = torch.stack([likelihood.fisher_times(f, x, y).flatten() for x in v])
    close(v.flatten(1) @ root.T @ root, expected)


@pytest.mark.parametrize("kind", PARAMETER_SPACE)
@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied", "language-model", "gru"])
def test_every_representation(name, kind):
    """Readings are means over the draws, within their errors of the measure of all outputs; batches and budget do not
    matter.
    """
    c = build(name)
    r = representation(kind, c.model)
    make = lambda loader, **options: nng.FIM(
        c.model, loader, r, estimator="rademacher", samples=20, generator=seeded(3), **options
    )
    m, exact = make(c.loader), nng.FIM(c.model, c.loader, r)
    assert type(m.matrix) is type(exact) and all(type(d) is type(exact) for d in m.draws)
    v = nng.PVector.randn(exact.layer_collection, generator=seeded(4), dtype=torch.float64)
    close(m.matrix.vTMv(v), m.vTMv(v).value)
    if not any(
        getattr(block, "uses", ()) for block in getattr(exact, "blocks", {}).values()
    ):  # joined factors are not linear in second moments
        close(torch.stack([d.vTMv(v) for d in m.draws]).mean(), m.vTMv(v).value)
        within(m.trace(), exact.trace())
        if kind not in ("ekfac", "mixed-sweeps"):  # the basis is that of the probes
            within(m.vTMv(v), exact.vTMv(v))
            within(m.mv(v), exact.mv(v))
    for loader in ((c.inputs, c.targets), iter([(x[None], y[None]) for x, y in zip(c.inputs, c.targets)])):
        close(make(loader, memory_budget=200_000).matrix.vTMv(v), m.matrix.vTMv(v), 1e-8)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_standard_errors_are_calibrated(likelihood):
    """Over 60 seeds the error in units of its standard error has spread one: neither too sure nor too modest."""
    model, x, y = problem("plain")
    exact = nng.FIM(model, (x, y), nng.PMatDiag, likelihood=likelihood)
    make = lambda seed: nng.FIM(
        model,
        (x, y),
        nng.PMatDiag,
        likelihood=likelihood,
        estimator="rademacher",
        samples=40,
        generator=seeded(seed),
        check=False,
    )
    scores = []
    for seed in range(60):
        e = make(seed).trace()
        scores.append((e.value - exact.trace()) / e.standard_error)
    z = torch.stack(scores)
    assert abs(float(z.mean())) < 0.45 and 0.75 < float(z.std()) < 1.3


def test_draws_are_keyed_by_example_and_sample():
    model, x, y = problem("plain")
    make = lambda samples, seed=0: nng.FIM(
        model, (x, y), nng.PMatDense, estimator="rademacher", samples=samples, generator=seeded(seed)
    )
    two, four = make(2), make(4)
    for a, b in zip(two.draws, four.draws):
        close(a.to_dense(), b.to_dense())
    assert float((make(2, seed=1).matrix.to_dense() - two.matrix.to_dense()).norm()) > 1e-3
    assert float(make(1).trace().standard_error) == float("inf")


def test_ten_thousand_outputs():
    """20 backward passes instead of 10 000, in single precision, and no matrix of outputs by outputs."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 10_000)), torch.randn(5, 3)
    first = nng.LayerCollection.from_model(model, include="0.*")
    for likelihood in ("categorical", "gaussian"):
        m = nng.FIM(
            model,
            x,
            nng.PMatDense,
            likelihood=likelihood,
            estimator="rademacher",
            samples=20,
            generator=seeded(0),
            layer_collection=first,
        )
        exact = nng.FIM(model, x, nng.PMatImplicit, likelihood=likelihood, layer_collection=first)
        v = nng.PVector.randn(first, 4, generator=seeded(0))
        within(m.vTMv(v), exact.vTMv(v))
        assert float(m.matrix.trace()) > 0 and m.matrix.dtype == torch.float32


def test_ekfac_scalings_have_errors_in_one_basis():
    c = build("mlp")
    base = nng.FIM(c.model, c.loader, nng.PMatEKFAC)
    m = base.rescaled(c.model, c.loader, estimator="rademacher", samples=200, generator=seeded(0))
    v = nng.PVector.randn(base.layer_collection, 4, generator=seeded(0), dtype=torch.float64)
    within(m.vTMv(v), base.vTMv(v))  # in a basis that does not depend on the draws, EKFAC is unbiased too


def test_refusals():
    model, x, y = problem("plain")
    with pytest.raises(nng.ArgumentError, match="estimator is 'hutchinson'"):
        nng.FIM(model, x, estimator="hutchinson")
    with pytest.raises(nng.ArgumentError, match="samples is 0"):
        nng.FIM(model, x, estimator="rademacher", samples=0)
    for options in ({"samples": 3}, {"generator": seeded(0)}):
        with pytest.raises(nng.ArgumentError, match=r"go with estimator='rademacher'.*FIM_MonteCarlo"):
            nng.FIM(model, x, **options)
    with pytest.raises(nng.UnsupportedError, match=r"no solve with a standard error; \.matrix\.solve"):
        nng.FIM(model, x, estimator="rademacher").solve(None)
    with pytest.raises(nng.LoaderError, match="loader is empty"):
        nng.FIM(model, [], estimator="rademacher")

    class Short(nng.Likelihood):
        def root_times(self, outputs, noise, targets=None):
            return noise(2)

    with pytest.raises(nng.OutputError, match="root_times returned"):
        nng.FIM(model, x, estimator="rademacher", likelihood=Short())


def test_the_trace_of_a_kernel_of_draws_has_the_error_of_its_draws():
    c = build("mlp")
    draw = lambda samples, seed: nng.GramMatrix(
        c.model, [c.inputs], estimator="rademacher", samples=samples, generator=seeded(seed)
    ).trace()
    one, many = draw(1, 0), [draw(8, seed) for seed in range(40)]
    assert torch.isinf(one.standard_error)
    spread = torch.stack([e.value for e in many]).std()
    error = torch.stack([e.standard_error for e in many]).square().mean().sqrt()
    assert 0.6 < float(spread / error) < 1.6
