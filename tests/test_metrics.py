"""Axis 2: every likelihood and loss against closed forms in the outputs, sandwiched between Jacobians of autograd
loops.
"""

import pytest
import reference
import torch
from cases.outputs import DIM, EXACT, LOSSES, SAMPLED, WEIGHT, Exponential, N, problem, ragged
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.cotangents import softmax


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()) + 1e-14)


def output_hessian(model, x, y, loss):
    """``(n, c, c)``: the Hessian in the flattened outputs of every example's loss, by double backward, one example at a
    time.
    """
    blocks = []
    for j in range(len(x)):
        f = model(x[j : j + 1]).detach()
        at = lambda v, f=f, j=j: loss(v.view(f.shape), None if y is None else y[j : j + 1]).sum()
        blocks.append(torch.autograd.functional.hessian(at, f.flatten()))
    return torch.stack(blocks)


def truth(model, x, y, loss):
    """The Gauss-Newton matrix of a loss."""
    return reference.sandwich(reference.jacobian(model, x), output_hessian(model, x, y, loss))


def masked(kind, outputs, y):
    """Softmax metrics ``(n, c, c)`` of all positions that count."""
    logits = outputs.detach().movedim(DIM[kind], -1)
    n, c = len(logits), logits.shape[-1]
    m = reference.softmax_metric(logits.reshape(-1, c)).view(n, -1, c, c)
    keep = torch.ones(n, m.shape[1]) if y is None else (y.view(n, -1) != -100)
    places = (
        torch.arange(outputs[0].numel()).view(outputs[0].shape).movedim(DIM[kind] - (DIM[kind] > 0), -1).reshape(-1, c)
    )
    out = torch.zeros(n, outputs[0].numel(), outputs[0].numel(), dtype=outputs.dtype)
    for t, place in enumerate(places):
        out[:, place[:, None], place] = m[:, t] * keep[:, t].view(-1, 1, 1)
    return out


# -- exact Fisher matrices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DIM)
@pytest.mark.parametrize("with_targets", [True, False])
def test_categorical(kind, with_targets):
    model, x, y = problem(kind)
    f = reference.sandwich(reference.jacobian(model, x), masked(kind, model(x), y if with_targets else None))
    for rep in (nng.PMatDense, nng.PMatImplicit, nng.PMatLowRank):
        m = nng.FIM(model, ragged(x, y if with_targets else None), rep, likelihood=nng.Categorical(dim=DIM[kind]))
        close(m.to_dense(), f)
        close(m.trace(), f.trace())


@pytest.mark.parametrize("name", EXACT)
def test_exact_fisher(name):
    model, x, _ = problem("plain")
    likelihood, metric = EXACT[name]
    f = reference.sandwich(reference.jacobian(model, x), metric(model(x).detach()))
    for rep in (nng.PMatDense, nng.PMatImplicit):
        close(nng.FIM(model, ragged(x), rep, likelihood=likelihood).to_dense(), f)


@pytest.mark.parametrize("name", EXACT)
def test_log_prob_has_this_fisher_information(name):
    """``E[-d2 log p] = E[s s^T]``: the likelihood's own density says the same as its square root."""
    likelihood = nng.FIM.__globals__["as_likelihood"](EXACT[name][0])
    f = torch.randn(2, 3, dtype=torch.float64)
    uniform = lambda *shape: torch.rand(2, *shape, dtype=torch.float64)
    labels = [likelihood.sample(f, uniform) for _ in range(1500)]
    scores = torch.stack([likelihood.score(f, y) for y in labels])
    information = torch.einsum("snc,sne->nce", scores, scores) / len(labels)
    assert float(scores.mean(0).abs().max()) < 0.15
    torch.testing.assert_close(information, EXACT[name][1](f), rtol=0.15, atol=0.12)


def test_saturated_outputs_stay_exact():
    model = nn.Linear(2, 3, bias=False).double()
    model.weight.data.copy_(torch.tensor([[1e4, 0.0], [0.0, 1.0], [-1e4, 30.0]]))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    for likelihood, metric in (EXACT["categorical"], EXACT["bernoulli"]):
        m = nng.FIM(model, x, nng.PMatDense, likelihood=likelihood).to_dense()
        close(m, reference.sandwich(reference.jacobian(model, x), metric(model(x).detach())))
        assert torch.linalg.eigvalsh(m).min() > -1e-12
    single = nng.FIM(model.float(), x.float(), nng.PMatDense).to_dense()
    assert bool(torch.isfinite(single).all()) and bool((single.diagonal() >= 0).all())


def test_positive_ignore_index():
    model, x, y = problem("tokens")
    other = torch.where(y == -100, torch.full_like(y, 255), y)
    a = nng.FIM(model, (x, y), nng.PMatDense, likelihood=nng.Categorical(-1))
    b = nng.FIM(model, (x, other), nng.PMatDense, likelihood=nng.Categorical(-1, ignore_index=255))
    assert torch.equal(a.to_dense(), b.to_dense())
    for weight in (None, torch.tensor([1.0, 2.0, 0.5])):
        for measure in (nng.GGN, nng.EmpiricalFIM):
            a, b = (
                measure(
                    model, (x, labels), nng.PMatDense, loss=nng.CrossEntropy(weight, ignore_index=i, dim=-1)
                ).to_dense()
                for labels, i in ((y, -100), (other, 255))
            )
            assert torch.equal(a, b) and bool(a.any())
    categorical = nng.Categorical(-1, ignore_index=255)
    f = model(x).detach()
    close(categorical.log_prob(f, other), nng.Categorical(-1).log_prob(f, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size, dim", [((6, 3), None), ((4, 40), None), ((5, 3, 1), 1), ((5, 4, 3), -1)])
def test_columns_of_a_softmax_are_the_same_some_at_a_time(size, dim, dtype, monkeypatch):
    """All of a small batch at once, or a few of a position after the other: a root of ``diag(p) - p p^T`` either way,
    with the same bits.
    """
    torch.manual_seed(0)
    f, likelihood = (5 * torch.randn(size)).to(dtype), nng.Categorical(dim)
    axis = 1 if dim is None else dim % f.ndim
    y = torch.randint(0, size[axis], [s for j, s in enumerate(size) if j != axis])
    y.view(-1)[0] = -100
    columns = likelihood.square_root(f, y)
    cuts = [(0, columns.count), (1, columns.count), (0, 1)]
    whole = [columns.make(*cut) for cut in cuts]
    monkeypatch.setattr(softmax, "NUMBERS", 1)
    for cut, v in zip(cuts, whole):
        torch.testing.assert_close(columns.make(*cut), v, rtol=0, atol=0)
    rows = torch.stack([likelihood.rows(v) for v in whole[0].double()])  # [k r c]
    p = likelihood.rows(f.double()).softmax(-1) * (y.flatten() != -100).unsqueeze(1)
    expected = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    tol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(torch.einsum("krc,krd->rcd", rows, rows), expected, rtol=tol, atol=tol)


def test_likelihoods_that_do_not_fit():
    model, x, y = problem("tokens")
    with pytest.raises(nng.OutputError, match=r"Categorical\(dim=1\)"):
        nng.FIM(model, x, nng.PMatDiag)
    with pytest.raises(nng.OutputError, match="does not fit outputs"):
        nng.FIM(model, (x, y), nng.PMatDiag, likelihood=nng.Categorical(dim=5))
    with pytest.raises(nng.OutputError, match=r"at least two classes.*bernoulli"):
        nng.FIM(nn.Linear(3, 1), torch.randn(2, 3), nng.PMatDiag)
    with pytest.raises(nng.OutputError, match="does not broadcast"):
        nng.FIM(model, (x, y), nng.PMatDiag, likelihood=nng.Gaussian(torch.ones(5)))
    with pytest.raises(nng.ArgumentError, match="positive finite"):
        nng.Gaussian(0.0)
    with pytest.raises(nng.ArgumentError, match="expected one of"):
        nng.FIM(model, (x, y), nng.PMatDiag, likelihood="normal")


# -- Monte Carlo -------------------------------------------------------------------------------------------------------


def within_its_error(exact, drawn, v):
    """Quadratic forms of low-rank draws against the exact ones, within four standard errors; the error of the last draw
    is small enough to tell.
    """
    rows = next(iter(drawn.blocks.values())).r
    forms = len(rows) * (rows @ v.T).square()  # one estimate a row
    error = forms.std(0) / len(rows) ** 0.5
    truth = torch.stack([exact.vTMv(nng.PVector(exact.layer_collection, x)) for x in v])
    assert bool(((forms.mean(0) - truth).abs() < 4 * error).all()) and bool((error < 0.2 * truth).all())


@pytest.mark.parametrize("name", SAMPLED)
def test_monte_carlo_is_unbiased(name):
    kind, likelihood = SAMPLED[name]
    model, x, y = problem(kind)
    exact = nng.FIM(model, (x, y), nng.PMatDense, likelihood=likelihood)
    drawn = nng.FIM_MonteCarlo(
        model,
        ragged(x, y),
        nng.PMatLowRank,
        likelihood=likelihood,
        samples=500,
        generator=torch.Generator().manual_seed(1),
    )
    within_its_error(exact, drawn, torch.randn(5, exact.shape[0], dtype=torch.float64))


@pytest.mark.parametrize("name", SAMPLED)
def test_monte_carlo_does_not_depend_on_batches(name):
    kind, likelihood = SAMPLED[name]
    model, x, y = problem(kind)
    make = lambda loader, rep=nng.PMatDense, seed=1, **o: nng.FIM_MonteCarlo(
        model, loader, rep, likelihood=likelihood, samples=3, generator=torch.Generator().manual_seed(seed), **o
    ).to_dense()
    whole = make((x, y))
    close(make(ragged(x, y)), whole)
    close(make([(x[j : j + 1], y[j : j + 1]) for j in range(N)], memory_budget=100_000), whole)
    close(make(ragged(x, y), nng.PMatImplicit), whole)
    assert float((make((x, y), seed=2) - whole).norm()) > 1e-3 * float(whole.norm())
    close(make(iter(ragged(x, y)), nng.PMatEKFAC).trace(), whole.trace())


def test_monte_carlo_draws_are_keyed_by_example_and_sample():
    """More samples keep the draws of fewer; a second half alone, with its own running index, has other draws."""
    model, x, y = problem("plain")
    rows = lambda data, samples: nng.FIM_MonteCarlo(
        model, data, nng.PMatLowRank, likelihood="gaussian", samples=samples, generator=torch.Generator().manual_seed(5)
    )
    r1, r2 = (next(iter(rows((x, y), s).blocks.values())).r.view(N, s, -1) * (N * s) ** 0.5 for s in (1, 2))
    close(r2[:, 0], r1[:, 0])
    half = next(iter(rows((x[3:], y[3:]), 1).blocks.values())).r * 3**0.5
    assert not torch.allclose(half, r1[3:, 0])


def test_very_many_outputs():
    """2000 outputs, 60 backward passes instead of 2000: unbiased all the same."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2000)).double(),
        torch.randn(5, 3, dtype=torch.float64),
    )
    for likelihood in ("categorical", "gaussian"):
        exact = nng.FIM(model, x, nng.PMatImplicit, likelihood=likelihood)
        drawn = nng.FIM_MonteCarlo(
            model, x, nng.PMatLowRank, likelihood=likelihood, samples=60, generator=torch.Generator().manual_seed(0)
        )
        assert next(iter(drawn.blocks.values())).r.shape[0] == 5 * 60
        v = torch.zeros(2, exact.shape[0], dtype=torch.float64)
        v[0, :8] = torch.randn(8, dtype=torch.float64)  # the first layer: all outputs
        v[1] = torch.randn(exact.shape[0], dtype=torch.float64)
        within_its_error(exact, drawn, v)
        assert abs(float(drawn.trace() / exact.trace()) - 1) < 0.1


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gauss_newton(name):
    kind, loss, plain = LOSSES[name]
    model, x, y = problem(kind)
    expected = truth(model, x, y, plain)
    for rep in (nng.PMatDense, nng.PMatImplicit):
        close(nng.GGN(model, ragged(x, y), rep, loss=loss).to_dense(), expected)


def test_implicit_products_form_no_columns(monkeypatch):
    """A vocabulary of columns a position would never end: products use the metric of the outputs itself."""
    model, x, y = problem("tokens")
    made = []
    plain = nng.Categorical.square_root

    def counted(self, outputs, targets=None):
        columns = plain(self, outputs, targets)
        return type(columns)(columns.count, lambda lo, hi: made.append(hi - lo) or columns.make(lo, hi))

    monkeypatch.setattr(nng.Categorical, "square_root", counted)
    for measure, how in (
        (nng.FIM, {"likelihood": nng.Categorical(-1)}),
        (nng.GGN, {"loss": nng.CrossEntropy(WEIGHT, 0.1, dim=-1)}),
    ):
        made.clear()
        m = measure(model, (x, y), nng.PMatImplicit, **how)
        m.mv(nng.PVector.randn(m.layer_collection, dtype=torch.float64))
        assert sum(made) <= 8  # the check's few


@pytest.mark.parametrize("name", LOSSES)
def test_empirical_fisher(name):
    kind, loss, plain = LOSSES[name]
    model, x, y = problem(kind)
    g = reference.loss_gradients(model, x, y, plain)
    for rep in (nng.PMatDense, nng.PMatImplicit):
        close(nng.EmpiricalFIM(model, ragged(x, y), rep, loss=loss).to_dense(), g.T @ g / N)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_soft_targets(weight, smoothing):
    model, x, _ = problem("plain")
    soft = torch.rand(N, 3, dtype=torch.float64)
    plain = lambda f, y: F.cross_entropy(f, y, weight, label_smoothing=smoothing, reduction="none")
    loss = nng.CrossEntropy(weight, smoothing)
    close(nng.GGN(model, ragged(x, soft), nng.PMatDense, loss=loss).to_dense(), truth(model, x, soft, plain))
    g = reference.loss_gradients(model, x, soft, plain)
    close(nng.EmpiricalFIM(model, ragged(x, soft), nng.PMatDense, loss=loss).to_dense(), g.T @ g / N)


def test_squared_error_is_the_gaussian_fisher():
    model, x, _ = problem("plain")
    y = torch.randn(N, 3, dtype=torch.float64)
    ggn = nng.GGN(model, ragged(x, y), nng.PMatDense, loss="mse")
    close(ggn.to_dense(), nng.FIM(model, ragged(x), nng.PMatDense, likelihood="gaussian").to_dense())
    g = reference.loss_gradients(model, x, y, lambda f, y: 0.5 * (f - y).square().sum(1))
    close(nng.EmpiricalFIM(model, ragged(x, y), nng.PMatDense, loss="mse").to_dense(), g.T @ g / N)
    one = nn.Linear(4, 1).double()
    flat = nng.EmpiricalFIM(one, (x, y[:, 0]), nng.PMatDense, loss="mse")  # targets (n,) for outputs (n, 1)
    close(flat.to_dense(), nng.EmpiricalFIM(one, (x, y[:, :1]), nng.PMatDense, loss="mse").to_dense())


def test_binary_targets_for_one_logit():
    """A label an example, ``(n,)`` or ``(n, 1)``, integer or real."""
    f, y = torch.randn(4, 1, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    for labels in (y, y[:, None], y.double()):
        close(
            nng.Bernoulli().log_prob(f, labels),
            -F.binary_cross_entropy_with_logits(f[:, 0], y.double(), reduction="none"),
        )


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_labels_of_any_integer_type(dtype):
    model, x, y = problem("segmentation")
    labels = y.clamp_min(0)
    a, b = (
        nng.GGN(model, (x, t), nng.PMatDense, loss=nng.CrossEntropy(WEIGHT)).to_dense()
        for t in (labels, labels.to(dtype))
    )
    assert torch.equal(a, b)
    a, b = (
        nng.EmpiricalFIM(model, (x, t), nng.PMatDense, loss="cross_entropy").to_dense()
        for t in (labels, labels.to(dtype))
    )
    assert torch.equal(a, b)
    assert torch.equal(
        nng.FIM(model, (x, labels.to(dtype)), nng.PMatDense).to_dense(),
        nng.FIM(model, (x, labels), nng.PMatDense).to_dense(),
    )


def test_losses_with_tensors_of_their_own():
    """A function that closes over single-precision tensors works on a single-precision model."""
    model, x, y = problem("plain")
    model, x, weight = model.float(), x.float(), WEIGHT.float()
    loss = lambda f, y: F.cross_entropy(f, y, weight, reduction="none")
    m = nng.GGN(model, (x, y), nng.PMatDense, loss=loss)
    close(m.to_dense(), nng.GGN(model, (x, y), nng.PMatDense, loss=nng.CrossEntropy(weight)).to_dense(), 1e-4)


def test_losses_that_are_refused():
    model, x, y = problem("plain")
    with pytest.raises(nng.ArgumentError, match=r"not convex.*use Hessian"):
        nng.GGN(model, (x, y), nng.PMatDiag, loss=lambda f, y: f.sin().sum(1))
    with pytest.raises(nng.OutputError, match="one number an example"):
        nng.GGN(model, (x, y), nng.PMatDiag, loss=lambda f, y: F.cross_entropy(f, y))
    with pytest.raises(nng.OutputError, match="one number an example"):
        nng.EmpiricalFIM(model, (x, y), nng.PMatDiag, loss=lambda f, y: f.square())
    with pytest.raises(nng.ArgumentError, match="expected 'cross_entropy', 'mse'"):
        nng.GGN(model, (x, y), nng.PMatDiag, loss="hinge")
    with pytest.raises(nng.ArgumentTypeError, match="loss is int"):
        nng.GGN(model, (x, y), nng.PMatDiag, loss=3)
    with pytest.raises(nng.OutputError, match=r"targets have shape \(6,\)"):
        nng.GGN(model, (x, y), nng.PMatDiag, loss="mse") and nng.EmpiricalFIM(model, (x, y), nng.PMatDiag, loss="mse")
    with pytest.raises(nng.LoaderError, match="needs targets"):
        nng.EmpiricalFIM(model, x, nng.PMatDiag, loss="mse")
    with pytest.raises(nng.ArgumentError, match="label_smoothing"):
        nng.CrossEntropy(label_smoothing=2)
    wide = nn.Linear(4, 5000).double()
    with pytest.raises(nng.SizeError, match="5000 x 5000 an example"):
        nng.GGN(wide, (x, y), nng.PMatDiag, loss=lambda f, y: f.square().sum(1))
    with pytest.raises(nng.OutputError, match="weight has 2"):
        nng.GGN(model, (x, y), nng.PMatDiag, loss=nng.CrossEntropy(torch.ones(2)))
    with pytest.raises(nng.OutputError, match=r"targets .* from 0 to 2"):
        nng.EmpiricalFIM(model, (x, y + 1), nng.PMatDiag, loss="cross_entropy")


# -- a user's own likelihood -------------------------------------------------------------------------------------------


def test_own_likelihood():
    model, x, _ = problem("plain")
    exact = nng.FIM(model, ragged(x), nng.PMatDense, likelihood=Exponential()).to_dense()
    close(exact, nng.FIM(model, ragged(x), nng.PMatDense, likelihood="gaussian").to_dense())
    close(nng.FIM(model, ragged(x), nng.PMatImplicit, likelihood=Exponential).to_dense(), exact)
    drawn = nng.FIM_MonteCarlo(model, x, nng.PMatDense, likelihood=Exponential(), samples=500).to_dense()
    assert float((drawn - exact).norm() / exact.norm()) < 0.15


class Half(nng.Likelihood):
    """Nothing defined."""


def test_own_likelihood_without_a_method():
    model, x, _ = problem("plain")
    with pytest.raises(nng.UnsupportedError, match="Half defines no square_root; use FIM_MonteCarlo"):
        nng.FIM(model, x, nng.PMatDiag, likelihood=Half())
    with pytest.raises(nng.UnsupportedError, match="Half defines no sample; use FIM"):
        nng.FIM_MonteCarlo(model, x, nng.PMatDiag, likelihood=Half())
