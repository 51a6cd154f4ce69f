"""Confident models: margins of 0 to 80 between logits, where ``1 - p`` and ``p (1 - p)`` are far below the rounding of
1.

The reference is exact arithmetic of 120 digits. The outputs of the model are the sum of its parameter and its input, so
that products with a matrix are those with the metric of the outputs, and every number of the inputs is exact in both
dtypes.
"""

import functools

import mpmath
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng

mpmath.mp.dps = 120
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
MARGINS = [0, 3, 18, 37, 80]
C = 5


class Outputs(nn.Module):
    """``f(x) = w + x``: the Jacobian of the outputs is the identity."""

    def __init__(self, dtype):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(C, dtype=dtype))

    def forward(self, x):
        return x + self.w


def exact(x):
    return [mpmath.mpf(float(v)) for v in x]


def softmax(z):
    e = [mpmath.exp(v) for v in exact(z)]
    return [v / mpmath.fsum(e) for v in e]


def sigma(v):
    return 1 / (1 + mpmath.exp(-v))


def metric_of_softmax(z):
    p = softmax(z)
    rest = [mpmath.fsum(p[:j] + p[j + 1 :]) for j in range(len(p))]
    return [[p[i] * rest[i] if i == j else -p[i] * p[j] for j in range(len(p))] for i in range(len(p))]


def diagonal(values):
    return [[v if i == j else mpmath.mpf(0) for j in range(len(values))] for i, v in enumerate(values)]


def error(got, expected):
    """Of lists of numbers, in norm, relative."""
    flat = lambda m: [v for row in m for v in row] if isinstance(m[0], (list, tuple)) else m
    got, expected = flat(got.double().tolist()), flat(expected)
    off = mpmath.norm([mpmath.mpf(a) - b for a, b in zip(got, expected)])
    return float(off / mpmath.norm(expected))


def logits(kind, margin, dtype):
    """One example; numbers that both dtypes hold. Softmax: class 2 leads by ``margin``; else logits of either sign,
    the last of them near zero, or with ``"sure"`` as large as the others.
    """
    z = torch.tensor([-0.25, 0.5, 0.125, -1.0, 0.75])
    if kind == "softmax":
        z[2] += 1 + margin
    elif kind == "poisson":
        z += torch.tensor([-1.0, 0.0, 0.0, 0.5, -0.5]) * margin
    else:
        z += torch.tensor([1.0, -1.0, 1.0, -1.0, float(kind == "sure")]) * margin
    return z.to(dtype).unsqueeze(0)


FISHERS = {
    "categorical": ("softmax", "categorical", metric_of_softmax),
    "bernoulli": ("logistic", "bernoulli", lambda z: diagonal([sigma(v) * sigma(-v) for v in exact(z)])),
    "poisson": ("poisson", "poisson", lambda z: diagonal([mpmath.exp(v) for v in exact(z)])),
    "gaussian": ("logistic", nng.Gaussian(0.5), lambda z: diagonal([mpmath.mpf(2)] * C)),
}
LEADS = torch.tensor([2])  # the label that is fitted
TRAILS = torch.tensor([4])
BITS = torch.tensor([[1, 0, 0, 1, 1]])  # fitted, fitted, not, not
LOSSES = {  # kind, what is given, targets, the gradient and the Hessian in the outputs
    "cross_entropy fitted": ("softmax", "cross_entropy", LEADS, lambda z: hard(z, 2), metric_of_softmax),
    "cross_entropy not": ("softmax", "cross_entropy", TRAILS, lambda z: hard(z, 4), metric_of_softmax),
    "module": ("softmax", nn.CrossEntropyLoss(), LEADS, lambda z: hard(z, 2), metric_of_softmax),
    "function": ("softmax", F.cross_entropy, LEADS, lambda z: hard(z, 2), metric_of_softmax),
    "partial": (
        "softmax",
        functools.partial(F.cross_entropy, reduction="none"),
        LEADS,
        lambda z: hard(z, 2),
        metric_of_softmax,
    ),
    "lambda fitted": (
        "softmax",
        lambda f, y: F.cross_entropy(f, y, reduction="none"),
        LEADS,
        lambda z: hard(z, 2),
        metric_of_softmax,
    ),
    "lambda not": (
        "softmax",
        lambda f, y: F.cross_entropy(f, y, reduction="none"),
        TRAILS,
        lambda z: hard(z, 4),
        metric_of_softmax,
    ),
    "log_softmax": (
        "softmax",
        lambda f, y: F.nll_loss(f.log_softmax(1), y, reduction="none"),
        LEADS,
        lambda z: hard(z, 2),
        metric_of_softmax,
    ),
    "bce": ("logistic", "bce", BITS, lambda z: bits(z), lambda z: FISHERS["bernoulli"][2](z)),
    "bce sure": ("sure", "bce", BITS, lambda z: bits(z), lambda z: FISHERS["bernoulli"][2](z)),
    "bce module": (
        "logistic",
        nn.BCEWithLogitsLoss(),
        BITS.float(),
        lambda z: bits(z),
        lambda z: FISHERS["bernoulli"][2](z),
    ),
    "bce lambda": (
        "logistic",
        lambda f, y: F.binary_cross_entropy_with_logits(f, y.to(f), reduction="none").sum(1),
        BITS,
        lambda z: bits(z),
        lambda z: FISHERS["bernoulli"][2](z),
    ),
    "logsigmoid": (
        "logistic",
        lambda f, y: -F.logsigmoid((2 * y.to(f) - 1) * f).sum(1),
        BITS,
        lambda z: bits(z),
        lambda z: FISHERS["bernoulli"][2](z),
    ),
    "softplus": (
        "logistic",
        lambda f, y: F.softplus((1 - 2 * y.to(f)) * f).sum(1),
        BITS,
        lambda z: bits(z),
        lambda z: FISHERS["bernoulli"][2](z),
    ),
    "poisson": (
        "poisson",
        "poisson",
        torch.tensor([[0.0, 1.0, 2.0, 0.0, 3.0]]),
        lambda z: [mpmath.exp(v) - y for v, y in zip(exact(z), (0, 1, 2, 0, 3))],
        lambda z: FISHERS["poisson"][2](z),
    ),
    "mse": (
        "logistic",
        nn.MSELoss(),
        torch.ones(1, C),
        lambda z: [2 * (v - 1) for v in exact(z)],
        lambda z: diagonal([mpmath.mpf(2)] * C),
    ),
}


def hard(z, y):
    p = softmax(z)
    return [-mpmath.fsum(p[:j] + p[j + 1 :]) if j == y else v for j, v in enumerate(p)]


def bits(z):
    return [-sigma(-v) if b else sigma(v) for v, b in zip(exact(z), BITS[0].tolist())]


def times(m, v):
    return [mpmath.fsum(a * b for a, b in zip(row, exact(v))) for row in m]


V = torch.tensor([1.0, -0.5, 0.25, 2.0, 0.75])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("name", FISHERS)
def test_fisher(name, margin, dtype):
    kind, likelihood, metric = FISHERS[name]
    x, model = logits(kind, margin, dtype), Outputs(dtype)
    expected, tolerance = metric(x[0]), TOLERANCE[dtype]
    implicit, dense = (nng.FIM(model, [(x,)], r, likelihood=likelihood) for r in (nng.PMatImplicit, nng.PMatDense))
    v = nng.PVector.from_flat(implicit.layer_collection, V.to(dtype))
    product = implicit.mv(v).flat()
    assert error(product, times(expected, V)) < tolerance
    assert error(dense.mv(v).flat(), times(expected, V)) < tolerance
    assert error(dense.to_dense(), expected) < tolerance
    assert error(implicit.to_dense(), expected) < tolerance
    if name == "categorical":  # orthogonal to constants
        assert abs(float(product.double().sum())) < 8 * torch.finfo(dtype).eps * float(product.double().abs().sum())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("name", LOSSES)
def test_gauss_newton_hessian_and_empirical(name, margin, dtype):
    kind, loss, y, gradient, metric = LOSSES[name]
    x, model, tolerance = logits(kind, margin, dtype), Outputs(dtype), TOLERANCE[dtype]
    expected = metric(x[0])
    v = V.to(dtype)
    for measure in (nng.GGN, nng.Hessian):
        for representation in (nng.PMatImplicit, nng.PMatDense):
            m = measure(model, [(x, y)], representation, loss=loss)
            assert error(m.mv(nng.PVector.from_flat(m.layer_collection, v)).flat(), times(expected, V)) < tolerance
            assert error(m.to_dense(), expected) < tolerance
    g = gradient(x[0])
    rows = nng.EmpiricalFIM(model, [(x, y)], nng.PMatLowRank, loss=loss)
    row = next(iter(rows.blocks.values())).r[0]
    assert min(error(row, g), error(-row, g)) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("margin", MARGINS)
def test_scores_of_either_label(margin, dtype):
    """What Monte-Carlo matrices average: of labels that are as good as never drawn, and of those that always are."""
    tolerance = TOLERANCE[dtype]
    x = logits("softmax", margin, dtype)
    for y in (LEADS, TRAILS):
        assert error(-nng.Categorical().score(x, y)[0], hard(x[0], int(y))) < tolerance
    x = logits("logistic", margin, dtype)
    assert error(-nng.Bernoulli().score(x, BITS)[0], bits(x[0])) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("margin", MARGINS)
def test_the_square_root_is_one(margin, dtype):
    """Columns, and products with them for random probes, ``L L^T = F``."""
    x = logits("softmax", margin, dtype)
    columns = nng.Categorical().square_root(x)
    v = columns.make(0, columns.count)[:, 0].double()
    expected = metric_of_softmax(x[0])
    assert error((v.T @ v).to(torch.float64), expected) < TOLERANCE[dtype]
    root = nng.Categorical().root_times(x, lambda *size: torch.eye(C, dtype=dtype).view(C, 1, *size))[:, 0].double()
    assert error(root.T @ root, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", MARGINS)
def test_weights_and_smoothing(margin, smoothing):
    weight = torch.tensor([0.5, 1.0, 3.0, 2.0, 0.25], dtype=torch.float64)
    loss = nng.CrossEntropy(weight, smoothing)
    x, model = logits("softmax", margin, torch.float64), Outputs(torch.float64)
    s = [mpmath.mpf(smoothing) / C * w for w in exact(weight)]
    s[2] += (1 - mpmath.mpf(smoothing)) * 3
    total = mpmath.fsum(s)
    expected = [[total * v for v in row] for row in metric_of_softmax(x[0])]
    for measure in (nng.GGN, nng.Hessian):
        assert error(measure(model, [(x, LEADS)], nng.PMatDense, loss=loss).to_dense(), expected) < 1e-10
    p = softmax(x[0])
    others = lambda a, j: mpmath.fsum(a[:j] + a[j + 1 :])
    g = [p[j] * others(s, j) - s[j] * others(p, j) for j in range(C)]
    assert error(loss.gradient(x, LEADS)[0], g) < 1e-10


HARD = {  # functions of which not every call is known, convex all the same
    "by hand": lambda f, y: -f.exp().div(f.exp().sum(1, keepdim=True)).gather(1, y[:, None]).log().squeeze(1),
    "logsumexp": lambda f, y: f.logsumexp(1) - f.gather(1, y[:, None]).squeeze(1),
    "softmax": lambda f, y: -f.softmax(1).gather(1, y[:, None]).log().squeeze(1),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("name", HARD)
def test_convex_functions_are_never_called_otherwise(name, margin, dtype):
    x, model = logits("softmax", margin, dtype), Outputs(dtype)
    m = nng.GGN(model, [(x, LEADS)], nng.PMatDense, loss=HARD[name])
    h = nng.Hessian(model, [(x, LEADS)], loss=HARD[name])
    v = nng.PVector.from_flat(h.layer_collection, V.to(dtype))
    assert bool(torch.isfinite(h.mv(v).flat()).all()) and bool(torch.isfinite(m.to_dense()).all())
    if name != "by hand":
        assert error(m.to_dense(), metric_of_softmax(x[0])) < TOLERANCE[dtype]
        assert error(h.mv(v).flat(), times(metric_of_softmax(x[0]), V)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("loss", ["cross_entropy", "bce", HARD["by hand"]])
def test_a_fitted_network_is_not_refused(loss, dtype):
    """Second derivatives of a saturated loss, to rounding or below what the dtype holds, are no reason to suspect the
    model.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    x = torch.randn(7, 4, dtype=dtype)
    y = model(x).argmax(1) if loss != "bce" else (model(x) > 0).to(dtype)
    for scale in (1, 10, 100, 1000) if not callable(loss) else (1, 10, 30):  # by hand, exp overflows further on
        with torch.no_grad():
            wide = lambda x, scale=scale: scale * model(x)
        m = nng.Hessian(model, [(x, y)], loss=loss, function=lambda x, y, wide=wide: wide(x))
        v = nng.PVector.randn(m.layer_collection, dtype=dtype)
        if not callable(loss):
            exact = nng.Hessian(
                model.double(), [(x.double(), y)], loss=loss, function=lambda x, y, wide=wide: wide(x)
            ).mv(v.to(torch.float64))
            model.to(dtype)
            if float(exact.norm()) > 1e-25:
                got = nng.Hessian(model, [(x, y)], loss=loss, function=lambda x, y, wide=wide: wide(x)).mv(v)
                torch.testing.assert_close(
                    got.flat().double() / exact.norm(), exact.flat() / exact.norm(), rtol=2e-2, atol=2e-3
                )
