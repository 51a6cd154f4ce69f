"""Model Gradient Similarity: closed forms and identities, finite differences, singular kernels, refusals."""

import copy
import gc
import math

import pytest
import reference
import torch
from cases import build
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import nngeom as nng
from nngeom import mgs

ZOO = ["mlp", "residual", "attention", "language-model", "gru", "tied", "weight-norm"]


def close(x, y, tol=1e-9):
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in (x, y)]
    torch.testing.assert_close(
        *(torch.as_tensor(t, dtype=torch.float64) for t in detached), rtol=tol, atol=tol, equal_nan=True
    )


@pytest.fixture(params=ZOO, scope="module")
def case(request):
    c = build(request.param, sizes=(2, 2))
    c.__dict__["jacobian"] = reference.jacobian(c.model, c.inputs)
    c.__dict__["name"] = request.param
    return c


def directional(model, value):
    """The derivative of ``value()`` along a random direction, by autograd and by central differences."""
    params = reference.parameters(model)
    v = [torch.randn_like(p) for p in params]
    grads = torch.autograd.grad(value(), params, allow_unused=True)
    analytic = sum(float((g * x).sum()) for g, x in zip(grads, v) if g is not None)
    ends = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, x in zip(params, v):
                p += step * x
        ends.append(float(value().detach()))
    with torch.no_grad():
        for p, x in zip(params, v):
            p += 1e-5 * x
    return analytic, (ends[0] - ends[1]) / 2e-5


# -- the trace ---------------------------------------------------------------------------------------------------------


def test_trace_penalty_and_its_gradient(case):
    value = mgs.trace_penalty(case.model, case.inputs)
    close(value, case.jacobian.square().sum())
    close(mgs.trace_penalty(case.model, case.inputs, reduction="mean"), value / case.n)
    analytic, numeric = directional(case.model, lambda: mgs.trace_penalty(case.model, case.inputs))
    close(analytic, numeric, 1e-6)


def layers_with_a_row_an_example(case):
    """Names of linear layers called once, with two axes; weights under weight norm are not plain."""
    calls = []
    handles = [
        m.register_forward_hook(lambda m, x, y, n=n: calls.append((n, x[0].ndim)))
        for n, m in case.model.named_modules()
        if type(m) is nn.Linear
    ]
    case.model(case.inputs)
    for h in handles:
        h.remove()
    plain = {name.rpartition(".")[0] for name, p in case.model.named_parameters() if name.endswith(".weight")}
    return {n for n, ndim in calls if ndim == 2 and sum(n == other for other, _ in calls) == 1 and n in plain}


def test_one_random_probe_and_its_gradient(case):
    """``|sum e J|^2`` for known signs, differentiable; by example in layers with one row an example."""
    draw = lambda: torch.Generator().manual_seed(5)
    signs = (2 * torch.randint(0, 2, (1, case.n, 3), generator=draw()) - 1).double()[0]
    rows = torch.einsum("nc,cnd->nd", signs, case.jacobian)
    single, expected, lo = layers_with_a_row_an_example(case), 0, 0
    for name, p in case.model.named_parameters():
        part, lo = rows[:, lo : lo + p.numel()], lo + p.numel()
        expected = expected + (part if name.rpartition(".")[0] in single else part.sum(0)).square().sum()
    close(mgs.trace_penalty(case.model, case.inputs, "rademacher", generator=draw()), expected)
    analytic, numeric = directional(
        case.model, lambda: mgs.trace_penalty(case.model, case.inputs, "rademacher", generator=draw())
    )
    close(analytic, numeric, 1e-6)


class Wide(nn.Module):
    """One matrix without bias, one used twice, one applied as ``x @ W``."""

    def __init__(self):
        super().__init__()
        self.first, self.bare, self.twice = nn.Linear(30, 20), nn.Linear(20, 20, bias=False), nn.Linear(20, 20)
        self.last = nn.Parameter(torch.randn(20, 3) / 4)

    def forward(self, x):
        h = self.bare(torch.tanh(self.first(x)))
        return torch.tanh(self.twice(torch.tanh(self.twice(h)))) @ self.last


def test_one_random_probe_by_rows_of_examples():
    """Value, gradient, and the gradient's gradient."""
    torch.manual_seed(0)
    model, x = Wide().double(), torch.randn(2, 30, dtype=torch.float64)
    draw = lambda: torch.Generator().manual_seed(5)
    penalty = lambda: mgs.trace_penalty(model, x, "rademacher", generator=draw())
    signs = (2 * torch.randint(0, 2, (1, 2, 3), generator=draw()) - 1).double()[0]
    params, twice = list(model.parameters()), list(model.twice.parameters())

    def plain():
        single = [p for p in params if all(p is not q for q in twice)]
        alone = [g for f, e in zip(model(x), signs) for g in torch.autograd.grad(f, single, e, create_graph=True)]
        return sum(g.square().sum() for g in (*alone, *torch.autograd.grad(model(x), twice, signs, create_graph=True)))

    close(penalty(), plain())
    firsts = [torch.autograd.grad(value(), params, create_graph=True) for value in (penalty, plain)]
    for ours, theirs in zip(*firsts):
        close(ours, theirs)
    seconds = [torch.autograd.grad(sum(g.square().sum() for g in first), params) for first in firsts]
    for ours, theirs in zip(*seconds):
        close(ours, theirs)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_random_probe_counts_uses_that_are_not_seen(hidden):
    from test_proofs import Counting

    model, x = Counting(), torch.randn(2, 4, dtype=torch.float64)
    model.hidden = hidden
    draws = torch.stack([mgs.trace_penalty(model, x, "rademacher", samples=64).detach() for _ in range(20)])
    exact = reference.jacobian(model, x).square().sum()
    assert abs(draws.mean() - exact) < 5 * draws.std() / 20**0.5


def test_what_was_proved_of_a_model_is_not_believed_of_its_successor():
    """As many examples as positions; then a layer is exchanged for one that has them the other way round."""

    class Turned(nn.Linear):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    for _ in range(2):
        close(mgs.trace_penalty(model, x), reference.jacobian(model, x).square().sum())
        model[2] = Turned(4, 4).double()


def test_random_probes_average_to_the_trace_over_all_signs(monkeypatch):
    c = build("mlp", sizes=(2,))
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6).view(64, 2, 3)
    monkeypatch.setattr("nngeom.mgs.penalties.rademacher", lambda *shape, like, generator: every)
    close(mgs.trace_penalty(c.model, c.inputs, "rademacher", samples=64), mgs.trace_penalty(c.model, c.inputs))


def test_outputs_come_along(case):
    for estimator in ("exact", "rademacher"):
        penalty, outputs = mgs.trace_penalty(
            case.model, case.inputs, estimator, return_outputs=True, generator=torch.Generator().manual_seed(0)
        )
        close(outputs, case.model(case.inputs))
        params = reference.parameters(case.model)
        both = torch.autograd.grad(F.cross_entropy(outputs, case.targets) + 0.1 * penalty, params, allow_unused=True)
        alone = torch.autograd.grad(F.cross_entropy(case.model(case.inputs), case.targets), params, allow_unused=True)
        again = mgs.trace_penalty(case.model, case.inputs, estimator, generator=torch.Generator().manual_seed(0))
        extra = torch.autograd.grad(again, params, allow_unused=True)
        for x, y, z in zip(both, alone, extra):
            close(x, y + (0 if z is None else 0.1 * z))


def test_two_linear_layers_in_closed_form():
    """``f = a^T W x``: ``tr K = sum |W x|^2 + |a|^2 |x|^2`` and its gradients."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    w, a = model[0].weight, model[1].weight
    value = mgs.trace_penalty(model, x)
    close(value, (x @ w.T).square().sum() + a.square().sum() * x.square().sum())
    gw, ga = torch.autograd.grad(value, (w, a))
    close(gw, 2 * w @ x.T @ x)
    close(ga, 2 * a * x.square().sum())


def test_linear_model_is_not_penalised():
    model = nn.Linear(4, 3).double()
    for value in (
        mgs.trace_penalty(model, torch.randn(5, 4, dtype=torch.float64)),
        mgs.logdet_penalty(model, torch.randn(2, 4, dtype=torch.float64)),
    ):
        grads = (
            torch.autograd.grad(value, list(model.parameters()), allow_unused=True) if value.requires_grad else [None]
        )
        assert all(g is None or float(g.abs().max()) < 1e-12 for g in grads)


def test_penalties_lower_what_they_penalise():
    c = build("mlp")
    for penalty in (
        mgs.trace_penalty,
        mgs.logdet_penalty,
        lambda m, x: mgs.trace_penalty(m, x, "rademacher", samples=8),
    ):
        model = build("mlp").model
        before = float(mgs.metrics(model, [c.inputs]).trace[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(10):
            optimizer.zero_grad()
            penalty(model, c.inputs).backward()
            optimizer.step()
        assert float(mgs.metrics(model, [c.inputs]).trace[0]) < before


def test_no_memory_is_kept():
    c, counts = build("mlp"), []
    for step in range(30):
        mgs.trace_penalty(c.model, c.inputs).backward()
        if step in (5, 29):
            gc.collect()
            counts.append(sum(type(x) in (torch.Tensor, nn.Parameter) for x in gc.get_objects()))
    assert counts[1] <= counts[0]


# -- the log-determinant -----------------------------------------------------------------------------------------------


def test_logdet_penalty_and_its_gradient(case):
    k = torch.einsum("knd,lmd->knlm", case.jacobian, case.jacobian).reshape(3 * case.n, -1)
    expected = torch.logdet(k + 0.1 * torch.eye(len(k), dtype=torch.float64))
    close(mgs.logdet_penalty(case.model, case.inputs), expected)
    close(mgs.logdet_penalty(case.model, case.inputs, reduction="mean"), expected / len(k))
    analytic, numeric = directional(case.model, lambda: mgs.logdet_penalty(case.model, case.inputs))
    close(analytic, numeric, 1e-6)


# -- loss gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrt", ["parameters", "inputs"])
def test_loss_gradient_penalty(case, wrt):
    if wrt == "inputs" and not case.inputs.is_floating_point():
        with pytest.raises(nng.ArgumentError, match="embeddings"):
            mgs.loss_gradient_penalty(case.model, case.inputs, case.targets, wrt)
        return
    x = case.inputs.clone().requires_grad_(wrt == "inputs")
    variables = [x] if wrt == "inputs" else reference.parameters(case.model)
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(F.cross_entropy(case.model(x), case.targets), variables, allow_unused=True)
    expected = sum(g.square().sum() for g in grads if g is not None)
    close(mgs.loss_gradient_penalty(case.model, case.inputs, case.targets, wrt), expected.sqrt())
    close(mgs.loss_gradient_penalty(case.model, case.inputs, case.targets, wrt, squared=True), expected)
    analytic, numeric = directional(
        case.model, lambda: mgs.loss_gradient_penalty(case.model, case.inputs, case.targets, wrt)
    )
    close(analytic, numeric, 1e-5)


def test_loss_gradients_are_bounded_by_the_trace(case):
    f = case.model(case.inputs).detach().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(f, case.targets), f)[0]
    left = mgs.loss_gradient_penalty(case.model, case.inputs, case.targets).detach()
    assert left <= case.jacobian.norm() * gradient.norm()


def test_loss_gradient_at_a_stationary_point():
    model = nn.Linear(2, 1).double()
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    x, y = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    value = mgs.loss_gradient_penalty(model, x, y, loss="mse")
    value.backward()
    assert value.item() == 0 and bool(torch.isfinite(model.weight.grad).all())


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_of_every_batch(case):
    found = mgs.metrics(case.model, case.loader)
    for i, (x, _) in enumerate(case.loader):
        j = reference.jacobian(case.model, x)
        k = torch.einsum("knd,lmd->knlm", j, j).reshape(3 * len(x), -1)
        values = torch.linalg.eigvalsh(k)
        close(found.trace[i], k.trace())
        close(found.eigenvalues[i], values.flip(0).clamp_min(0), 1e-7)
        if values[0] > 1e-8 * values[-1]:
            close(found.logdet[i], torch.logdet(k), 1e-6)
            assert found.logdet[i] <= len(k) * (k.trace() / len(k)).log()  # means of eigenvalues
        close(found.logdet_jittered[i], torch.logdet(k + 1e-6 * torch.eye(len(k), dtype=torch.float64)), 1e-5)
        cosine = nng.analysis.normalised_gram(k)
        close(found.cosine[i], (cosine.sum() - len(k)) / (len(k) * (len(k) - 1)))
    assert found.trace.shape == found.logdet.shape == found.rank.shape == (2,) and len(found.eigenvalues) == 2


def test_singular_kernels_are_no_error():
    c = build("mlp")
    twice = c.inputs[[0, 0, 1]]
    found = mgs.metrics(c.model, [twice])
    assert float(found.logdet[0]) == -math.inf and int(found.rank[0]) == 6 and math.isfinite(found.logdet_jittered[0])
    dead = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
    nn.init.zeros_(dead[2].weight), nn.init.zeros_(dead[0].weight)
    zero = mgs.metrics(dead, [c.inputs])
    assert (
        float(zero.trace[0]) == 0
        and int(zero.rank[0]) == 0
        and float(zero.logdet[0]) == -math.inf
        and float(zero.effective_rank[0]) == 0
    )
    assert math.isfinite(mgs.logdet_penalty(dead, c.inputs).detach())
    one = mgs.metrics(nn.Linear(2, 1).double(), [torch.ones(1, 2, dtype=torch.float64)])
    assert float(one.trace[0]) == 3 and math.isnan(one.cosine[0])


def deep(width, depth):
    torch.manual_seed(0)
    layers = [layer for i in range(depth) for layer in (nn.Linear(64 if i == 0 else width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10)), torch.rand(16, 64)


@pytest.mark.parametrize("measure", ["metrics", "tracker"])
def test_float32_tells_a_wide_spectrum_from_a_singular_one(measure):
    """Eigenvalues a millionth of the largest are no rounding errors; those of repeated examples are."""
    model, x = deep(80, 5)
    whole = reference.jacobian(copy.deepcopy(model).double(), x.double()).flatten(0, 1)
    values = torch.linalg.eigvalsh(whole @ whole.T)
    assert values[0] < 160 * torch.finfo(torch.float32).eps * values[-1]
    if measure == "tracker":
        row = nng.track.Tracker(model, [(x, torch.zeros(16, dtype=torch.long))], ["mgs"]).measure(0)
        close(row["mgs_logdet"], (values + 1e-6).log().mean(), 1e-4)
        return
    found = mgs.metrics(model, [x, x[[0, 1, 1]]])
    assert found.rank.tolist() == [160, 20] and float(found.logdet[1]) == -math.inf
    close(found.logdet[0], values.log().sum(), 1e-4)
    close(found.mean_log[0], (values + 1e-6).log().mean(), 1e-4)
    close(found.trace[0], values.sum(), 1e-5)


def test_interlacing_of_the_centred_kernel(case):
    j = case.jacobian.reshape(-1, case.jacobian.shape[-1])
    centred = j - j.mean(0)
    plain, inner = (torch.linalg.eigvalsh(x @ x.T).flip(0) for x in (j, centred))
    tol = 1e-9 * plain[0]
    assert bool((inner <= plain + tol).all()) and bool((inner[:-1] >= plain[1:] - tol).all()) and inner[-1].abs() < tol
    close(mgs.kernel_metrics(centred @ centred.T).rank[0], min(len(j) - 1, int((inner > 1e-8 * inner[0]).sum())))


def test_gradient_descent_step_by_the_kernel():
    """The residual of ``f - lr K grad_f L`` shrinks four times when the rate halves."""
    c, residuals = build("attention"), []
    for lr in (1e-2, 5e-3):
        s = nng.analysis.step_modes(c.model, c.loader, lr)
        residuals.append((s.change - s.predicted_change).norm())
    assert 3.9 < residuals[0] / residuals[1] < 4.1


# -- adversarial scores ------------------------------------------------------------------------------------------------


def test_scores_of_single_examples(case):
    close(mgs.sample_trace(case.model, case.loader), case.jacobian.square().sum((0, 2)))
    close(mgs.sample_trace(case.model, (case.inputs,)), case.jacobian.square().sum((0, 2)))
    lam = reference.softmax_metric(case.model(case.inputs))
    expected = torch.einsum("cnd,nce,end->n", case.jacobian, lam, case.jacobian)
    close(mgs.sample_fisher_trace(case.model, case.loader), expected)


def test_attacks():
    c = build("mlp")
    before = F.cross_entropy(c.model(c.inputs), c.targets)
    single, many = mgs.fgsm(c.model, c.inputs, c.targets, 0.05), mgs.pgd(c.model, c.inputs, c.targets, 0.05, steps=10)
    for x in (single, many):
        assert float((x - c.inputs).abs().max()) <= 0.05 + 1e-12
        assert F.cross_entropy(c.model(x), c.targets) > before
    close(single - c.inputs, 0.05 * (single - c.inputs).sign())
    assert mgs.auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])) == 1
    assert mgs.auroc(torch.tensor([1.0, 1.0]), torch.tensor([1.0])) == 0.5
    with pytest.raises(nng.NonFiniteError, match="NaN"):
        mgs.auroc(torch.tensor([0.0, math.nan]), torch.tensor([1.0]))
    with pytest.raises(nng.ArgumentError, match="at least one"):
        mgs.auroc(torch.tensor([]), torch.tensor([1.0]))


# -- errors ------------------------------------------------------------------------------------------------------------


def test_refusals():
    c = build("mlp")
    for call in (
        lambda: mgs.trace_penalty(c.model, c.inputs, "other"),
        lambda: mgs.trace_penalty(c.model, c.inputs, reduction="none"),
        lambda: mgs.trace_penalty(c.model, c.inputs, "rademacher", samples=0),
        lambda: mgs.logdet_penalty(c.model, c.inputs, jitter=0),
        lambda: mgs.metrics(c.model, [c.inputs], jitter=-1),
        lambda: mgs.loss_gradient_penalty(c.model, c.inputs, c.targets, wrt="outputs"),
    ):
        with pytest.raises(nng.ArgumentError, match="expected"):
            call()
    dropout = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    for estimator in ("exact", "rademacher"):
        with pytest.raises(nng.ModeError, match="eval"):
            mgs.trace_penalty(dropout, c.inputs, estimator)
        with pytest.raises(nng.CoverageError, match="do not depend"):
            mgs.trace_penalty(c.model, c.inputs, estimator, function=lambda x: c.model(x).detach())
    with pytest.raises(nng.LoaderError, match="empty"):
        mgs.metrics(c.model, [])


def test_nan_stays_nan():
    """A loss scaler, or a user, must see it; no penalty passes for zero."""
    model, x = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(),
        torch.full((5, 3), torch.nan, dtype=torch.float64),
    )
    values = [mgs.trace_penalty(model, x), mgs.trace_penalty(model, x, "rademacher")]
    values += [
        mgs.loss_gradient_penalty(model, x, torch.zeros(5, dtype=torch.long), squared=squared)
        for squared in (False, True)
    ]
    assert all(bool(v.isnan()) for v in values)
    close(mgs.trace_penalty(model, x.nan_to_num(1.0)), reference.jacobian(model, x.nan_to_num(1.0)).square().sum())
