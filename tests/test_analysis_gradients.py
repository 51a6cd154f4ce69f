"""Stiffness, coherence, geometric complexity, sharpness: against loops, identities, degenerate inputs."""

import math
from itertools import combinations

import pytest
import reference
import torch
from cases import build
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import nngeom as nng
from nngeom import analysis

ZOO = ["mlp", "conv2d", "attention", "language-model", "gru"]


def cross_entropy(f, y):
    """One number an example."""
    return F.cross_entropy(f, y, reduction="none")


@pytest.fixture(params=ZOO, scope="module")
def case(request):
    c = build(request.param)
    c.__dict__["gradients"] = reference.loss_gradients(c.model, c.inputs, c.targets, cross_entropy)
    c.__dict__["name"] = request.param
    return c


def close(x, y, tol=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(x, dtype=torch.float64),
        torch.as_tensor(y, dtype=torch.float64),
        rtol=tol,
        atol=tol,
        equal_nan=True,
    )


# -- stiffness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cosine", "sign"])
def test_stiffness_against_a_loop(case, kind):
    found = analysis.stiffness(case.model, case.loader, kind)
    g, y, n = case.gradients, case.targets, case.n
    pair = lambda i, j: float(F.cosine_similarity(g[i], g[j], 0)) if kind == "cosine" else float((g[i] @ g[j]).sign())
    matrix = torch.tensor([[pair(i, j) for j in range(n)] for i in range(n)], dtype=torch.float64)
    close(found.matrix, matrix)
    close(found.mean, sum(matrix[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1)))
    classes = sorted(set(y.tolist()))
    assert found.classes.tolist() == classes
    for a, ca in enumerate(classes):
        for b, cb in enumerate(classes):
            values = [matrix[i, j] for i in range(n) for j in range(n) if i != j and y[i] == ca and y[j] == cb]
            close(found.by_class[a, b], sum(values) / len(values) if values else math.nan)
    close(found.by_class, found.by_class.T)
    diagonal = found.by_class.diagonal()
    close(found.within, diagonal[~diagonal.isnan()].mean())
    close(found.between, (found.by_class.nansum() - diagonal.nansum()) / (len(classes) * (len(classes) - 1)))
    cosine = F.cosine_similarity(g[:, None], g[None], 2)
    close(found.distance, 1 - cosine)


def test_stiffness_between_two_sets_keeps_every_pair(case):
    second = build(case.name, sizes=(2, 3))
    found = analysis.stiffness(case.model, case.loader, other=second.loader)
    g = reference.loss_gradients(case.model, second.inputs, second.targets, cross_entropy)
    close(found.matrix, F.cosine_similarity(case.gradients[:, None], g[None], 2))
    close(found.mean, found.matrix.mean())
    assert found.matrix.shape == (7, 5)


@pytest.mark.filterwarnings("ignore::nngeom.core.errors.MemoryWarning")
def test_stiffness_does_not_depend_on_batches_or_budget(case):
    whole = analysis.stiffness(case.model, (case.inputs, case.targets))
    small = analysis.stiffness(case.model, case.loader, memory_budget=4000)
    close(small.matrix, whole.matrix)


def test_stiffness_extremes():
    g = torch.tensor([[1.0, 2.0], [-2.0, -4.0], [0.0, 0.0]], dtype=torch.float64)
    found = analysis.gradient_stiffness(g[:2])
    close(found.mean, -1)
    close(found.distance, [[0, 2], [2, 0]], 1e-12)
    zero = analysis.gradient_stiffness(g, kind="sign", labels=torch.tensor([0, 0, 1]))
    close(zero.matrix[2], [0, 0, 0])
    close(zero.within, -1)  # the class with one point has no pair
    assert zero.by_class[1, 1].isnan()
    assert analysis.gradient_stiffness(g[:1]).mean.isnan()
    one_class = analysis.gradient_stiffness(g, labels=torch.zeros(3, dtype=torch.long))
    assert one_class.between.isnan() and one_class.classes.tolist() == [0]
    assert analysis.gradient_stiffness(g).classes.numel() == 0
    with pytest.raises(nng.ArgumentError, match="'cosine' or 'sign'"):
        analysis.gradient_stiffness(g, kind="angle")


def test_gradients_that_are_not_finite():
    """Neither a zero gradient nor a coherent set: refused. So is a coherence that is none, which would bound a gap by
    0.
    """
    g = torch.tensor([[1.0, 2.0], [math.nan, 1.0]])
    for call in (
        lambda: analysis.gradient_stiffness(g),
        lambda: analysis.gradient_stiffness(g[:1], g),
        lambda: analysis.gradient_coherence(g),
    ):
        with pytest.raises(nng.NonFiniteError, match="NaN"):
            call()
    for alpha in (math.nan, -0.1, 1.1):
        with pytest.raises(nng.ArgumentError, match=r"\[0, 1\]"):
            analysis.generalization_gap_bound([0.5, alpha], [0.1, 0.1], 10)


def test_examples_without_gradients():
    """A model that fits exactly: no pair helps or harms, and coherence has no value; neither is an error."""
    model, x = nn.Linear(4, 2).double(), torch.randn(5, 4, dtype=torch.float64)
    fitted = [(x, model(x).detach())]
    assert float(analysis.stiffness(model, fitted, loss="mse").matrix.abs().max()) == 0
    found = analysis.coherence(model, fitted, loss="mse")
    assert found.alpha.isnan() and found.ratio.isnan() and all(c.alpha.isnan() for c in found.by_layer.values())
    one = analysis.stiffness(model, [(x[:1], torch.tensor([1]))])
    assert one.mean.isnan() and one.within.isnan() and one.between.isnan() and float(one.matrix) == 1
    close(analysis.coherence(model, [(x[:1], torch.tensor([1]))]).ratio, 1)


# -- coherence ---------------------------------------------------------------------------------------------------------


def test_coherence_against_its_definition(case):
    found = analysis.coherence(case.model, case.loader)
    g, n = case.gradients, case.n
    alpha = lambda x: float((x @ x.T).mean() / x.square().sum(1).mean())
    close(found.alpha, alpha(g))
    close(found.ratio, n * alpha(g))
    close(found.by_batch, [alpha(g[:3]), alpha(g[3:])])
    lc = nng.LayerCollection.from_model(case.model)
    at, places = 0, {}
    for shape, layer in zip(lc.shapes, lc.layers):
        size = math.prod(shape)
        places.setdefault(layer, []).extend(range(at, at + size))
        at += size
    assert list(found.by_layer) == list(places)
    for layer, index in places.items():
        close(found.by_layer[layer].alpha, alpha(g[:, index]))


def test_coherence_extremes():
    eye = torch.eye(6, dtype=torch.float64)
    close(analysis.gradient_coherence(eye * torch.arange(1.0, 7.0)).ratio, 1)  # orthogonal, of any norms
    same = torch.randn(1, 4, dtype=torch.float64).expand(6, 4)
    close(analysis.gradient_coherence(same).alpha, 1)
    close(analysis.gradient_coherence(same).ratio, 6)
    close(analysis.gradient_coherence(torch.cat([same, -same])).alpha, 0)
    copies = eye[:4].repeat(5, 1)
    close(analysis.gradient_coherence(copies).alpha, 1 / 4)
    close(analysis.gradient_coherence(copies).ratio, 5)
    g = torch.randn(7, 3, dtype=torch.float64)
    close(analysis.gradient_coherence(-3 * g).alpha, analysis.gradient_coherence(g).alpha)
    assert analysis.gradient_coherence(torch.zeros(3, 2)).alpha.isnan()
    with pytest.raises(nng.ArgumentError, match="at least one row"):
        analysis.gradient_coherence(torch.zeros(0, 2))


def test_motivating_example():
    """Six features, five rows; a feature all rows share makes the gradients coherent."""
    y = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    for shared, expected in ((1.0, 0.625), (0.0, 0.25)):
        x = torch.cat([torch.diag(y), torch.zeros(4, 1, dtype=torch.float64), shared * y[:, None]], 1)
        gradients = -y[:, None] * x  # at w = 0
        found = analysis.gradient_coherence(gradients)
        close(found.alpha, expected)
        model = nn.Linear(6, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        close(analysis.coherence(model, (x, y), loss="mse").alpha, expected)


def test_coherence_from_every_partition_is_exact():
    """The finite-sample inverse, with the coherence of batches over all partitions of 6 points into 3 pairs."""
    g = torch.randn(6, 4, dtype=torch.float64) + 0.7
    alpha = analysis.gradient_coherence(g).alpha
    means = torch.stack([g[list(pair)].mean(0) for pair in combinations(range(6), 2)])  # every pair is as likely
    measured = means.mean(0).square().sum() / means.square().sum(1).mean()
    close(analysis.batch_coherence(alpha, 2, 6), measured)
    # each pair appears once among the rows: their coherence is the expectation form
    close(analysis.coherence_from_batch_gradients(means, 2, examples=6).alpha, alpha)
    close(analysis.coherence_from_batch_gradients(means, 2, examples=6).ratio, 6 * alpha)


def test_coherence_of_independent_batches_by_simulation():
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(20, 3, dtype=torch.float64, generator=generator) + 0.8
    alpha = analysis.gradient_coherence(g).alpha
    draws = g[torch.randint(20, (40_000, 4), generator=generator)].mean(1)
    close(analysis.batch_coherence(alpha, 4), analysis.gradient_coherence(draws).alpha, 2e-2)
    close(analysis.coherence_from_batch_gradients(draws, 4, scheme="iid").alpha, alpha, 2e-2)


def test_the_iid_inverse_is_biased_on_a_partition():
    eye = torch.eye(12, dtype=torch.float64)
    means = eye.view(4, 3, 12).mean(1)
    close(12 * analysis.coherence_from_batch_gradients(means, 3, scheme="iid").alpha, 12 / 10)
    close(analysis.coherence_from_batch_gradients(means, 3).ratio, 1)
    assert analysis.coherence_from_batch_gradients(
        means.mean(0, keepdim=True), 12
    ).alpha.isnan()  # one batch: nothing to learn
    close(analysis.coherence_from_batch_gradients([eye[0], eye[1]], 1).alpha, 0.5)
    for options in ({"batch_size": 3, "scheme": "other"}, {"batch_size": 0}, {"batch_size": 3, "examples": 2}):
        with pytest.raises(nng.ArgumentError):
            analysis.coherence_from_batch_gradients(means, **options)


def test_gap_bound():
    close(analysis.generalization_gap_bound([1.0] * 5, [0.1] * 5, 10), 0)
    close(analysis.generalization_gap_bound([0.0] * 5, [0.1] * 5, 10, lipschitz=3), math.sqrt(2) * 9 * 0.5 / 10)
    doubled = analysis.generalization_gap_bound([0.3, 0.6], [0.2, 0.4], 10)
    close(
        doubled, 2 * analysis.generalization_gap_bound([0.3, 0.6], [0.1, 0.2], 10)
    )  # linear in the rates for beta = 0
    expected = 0.1 * 1.2 * math.sqrt(2 * 0.7) + 0.2 * math.sqrt(2 * 0.4)
    close(analysis.generalization_gap_bound([0.3, 0.6], [0.1, 0.2], 1, smoothness=1), expected)
    with pytest.raises(nng.ArgumentError, match="one of each"):
        analysis.generalization_gap_bound([0.3], [0.1, 0.2], 1)


# -- geometric complexity ----------------------------------------------------------------------------------------------


def input_jacobians(model, inputs):
    """``sum_i |d f(x_i) / d x_i|^2`` by loops."""
    total = 0.0
    for x in inputs:
        x = x[None].clone().requires_grad_()
        for f in model(x)[0].flatten():
            total += float(torch.autograd.grad(f, x, retain_graph=True)[0].square().sum())
    return total


@pytest.mark.parametrize("name", ["mlp", "conv2d", "attention", "gru"])
def test_geometric_complexity_against_a_loop(name):
    c = build(name)
    expected = input_jacobians(c.model, c.inputs) / c.n
    close(analysis.geometric_complexity(c.model, c.loader), expected)
    close(analysis.geometric_complexity(c.model, c.loader, memory_budget=2000), expected)
    g = torch.Generator().manual_seed(0)
    estimate = analysis.geometric_complexity(c.model, c.loader, estimator="rademacher", samples=2000, generator=g)
    assert abs(float(estimate) / expected - 1) < 0.1
    assert all(p.grad is None for p in c.model.parameters()) and not c.inputs.requires_grad


@pytest.mark.parametrize("name", ["mlp", "conv2d", "attention"])
def test_geometric_complexity_is_differentiable(name):
    c = build(name)
    p = next(c.model.parameters())
    value = analysis.geometric_complexity(c.model, c.loader, differentiable=True)
    gradient = torch.autograd.grad(value, p)[0]
    v, eps = torch.randn_like(p), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            p += sign * eps * v
            values.append(float(analysis.geometric_complexity(c.model, c.loader)))
            p -= sign * eps * v
    close((gradient * v).sum().detach(), (values[0] - values[1]) / (2 * eps), 1e-6)


def test_geometric_complexity_facts():
    """|W|^2 of a linear map; activation patterns of a ReLU net; below the operator-norm bound."""
    linear = nn.Linear(4, 3).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    close(analysis.geometric_complexity(linear, [x]), linear.weight.detach().square().sum())
    close(
        analysis.geometric_complexity(linear, [x], function=lambda x: linear.bias.expand(len(x), 3)), 0
    )  # outputs that ignore the inputs
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    a, b = net[0].weight.detach(), net[2].weight.detach()
    on = (net[0](x) > 0).double()
    maps = torch.stack([b @ torch.diag(m) @ a for m in on])
    close(analysis.geometric_complexity(net, [x]), maps.square().sum((1, 2)).mean())
    operator = torch.linalg.matrix_norm(maps, 2).square().mean()
    lipschitz = (torch.linalg.matrix_norm(a, 2) * torch.linalg.matrix_norm(b, 2)).square()
    assert analysis.geometric_complexity(net, [x]) <= 3 * operator <= 3 * lipschitz


def test_geometric_complexity_refuses():
    with pytest.raises(nng.ArgumentError, match="embeddings"):
        c = build("language-model")
        analysis.geometric_complexity(c.model, c.loader)
    with pytest.raises(nng.ModeError, match="eval"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
        analysis.geometric_complexity(model, [torch.randn(3, 4)])
    with pytest.raises(nng.ArgumentError, match="rademacher"):
        analysis.geometric_complexity(nn.Linear(2, 2), [torch.randn(3, 2)], estimator="other")


# -- sharpness and stability -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "tied", "language-model", "attention"])
def test_sharpness(name):
    c = build(name)
    with sdpa_kernel(SDPBackend.MATH):  # the flash kernel has no second derivative; the library does without being told
        h = reference.hessian(c.model, c.inputs, c.targets, cross_entropy)
    close(analysis.sharpness(c.model, c.loader), torch.linalg.eigvalsh(h)[-1], 1e-7)


def test_sharpness_is_the_largest_and_not_the_largest_in_modulus():
    """Concave, and flat: both have a documented value."""
    c = build("mlp")
    concave = lambda f, y: -f.square().sum(1)
    h = reference.hessian(c.model, c.inputs, c.targets, concave)
    values = torch.linalg.eigvalsh(h)
    assert -values[0] > values[-1]
    close(analysis.sharpness(c.model, c.loader, loss=concave), values[-1], 1e-7)
    flat = lambda f, y: 0 * f.sum(1)
    close(analysis.sharpness(c.model, c.loader, loss=flat), 0)
    close(analysis.non_uniformity(c.model, [(c.inputs[:2], c.targets[:2])], loss=flat), 0)
    close(analysis.non_uniformity(c.model, [(c.inputs[:1], c.targets[:1])]), 0, 1e-6)  # one example: no spread


@pytest.mark.parametrize("name", ["reused", "tied", "attention"])
def test_non_uniformity(name):
    c = build(name, sizes=(2, 1))
    with sdpa_kernel(SDPBackend.MATH):
        single = torch.stack(
            [reference.hessian(c.model, x[None], y[None], cross_entropy) for x, y in zip(c.inputs, c.targets)]
        )
    h = single.mean(0)
    covariance = (single @ single).mean(0) - h @ h
    close(analysis.non_uniformity(c.model, c.loader), torch.linalg.eigvalsh(covariance)[-1].sqrt(), 1e-6)


def test_stability_in_one_dimension_by_enumeration():
    h = torch.rand(8, dtype=torch.float64) * 3
    for batch in (1, 3, 8):
        expected = torch.stack([(1 - 0.4 * h[list(c)].mean()).square() for c in combinations(range(8), batch)]).mean()
        close(analysis.stability_eigenvalue(h.view(8, 1, 1), 0.4, batch), expected)


def test_stability_condition():
    x = torch.randn(6, 3, dtype=torch.float64)
    single = x[:, :, None] * x[:, None]
    h = single.mean(0)
    step = torch.eye(3, dtype=torch.float64) - 0.1 * h
    close(analysis.stability_eigenvalue(single, 0.1, 6), torch.linalg.eigvalsh(step @ step)[-1])
    verdict = analysis.sgd_stability(3.9, 1.0, lr=0.5, batch_size=2, n=10)
    assert (
        verdict
        and verdict.largest_sharpness == 4
        and verdict.largest_non_uniformity == pytest.approx(2 * math.sqrt(18 / 8))
    )
    assert not analysis.sgd_stability(4.1, 0.0, 0.5, 2, 10)
    assert not analysis.sgd_stability(1.0, 3.1, 0.5, 2, 10)
    assert analysis.sgd_stability(1.0, 1e9, 0.5, 10, 10)  # full batches
    assert analysis.sgd_stability(1.0, 0.0, 0.5, 1, 1)
    with pytest.raises(nng.ArgumentError, match="1 <= batch_size <= n"):
        analysis.sgd_stability(1.0, 1.0, 0.5, 11, 10)
    with pytest.raises(nng.ArgumentError, match=r"\(n, d, d\)"):
        analysis.stability_eigenvalue(h, 0.1, 1)


def test_labels_are_asked_for():
    c = build("mlp")
    with pytest.raises(nng.LoaderError, match="targets"):
        analysis.coherence(c.model, [c.inputs])
    with pytest.raises(nng.LoaderError, match="empty"):
        analysis.stiffness(c.model, [])


def test_ignored_labels_are_no_class():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, -100, 2, 0, 1])
    found = analysis.stiffness(model, [(x, y)])
    kept = analysis.stiffness(model, [(x[y >= 0], y[y >= 0])])
    assert found.classes.tolist() == [0, 1, 2]
    torch.testing.assert_close(found.by_class, kept.by_class, equal_nan=True)
    assert not found.matrix[2].any()
