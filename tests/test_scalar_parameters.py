"""Parameters of no dimensions (a logit scale, a temperature) and without elements, in everything that takes a model."""

import copy

import pytest
import reference
import torch
from cases import ENTRIES, PARAMETER_SPACE, STORED, representation
from exactness import close, require_exact
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom import analysis, linearized, mgs, optim

f64 = torch.float64


def number(value=1.3):
    return nn.Parameter(torch.tensor(value, dtype=f64))


def nothing(*shape):
    return nn.Parameter(torch.empty(shape, dtype=f64))


class With(nn.Module):
    """A linear map and further parameters, used as ``forward(self, h, x)`` says, ``h`` the output of the map."""

    def __init__(self, forward, **parameters):
        super().__init__()
        self.map = nn.Linear(4, 3, dtype=f64)
        for name, p in parameters.items():
            setattr(self, name, p)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, self.map(x), x)


SCALAR_USES = {
    "x * t": lambda m, h, x: h.tanh() * m.t,
    "t * x": lambda m, h, x: m.t * h.tanh(),
    "x / t": lambda m, h, x: h.tanh() / m.t,
    "t / x": lambda m, h, x: m.t / (2 + h.tanh()),
    "x * exp(t)": lambda m, h, x: h.tanh() * m.t.exp(),
    "normalised": lambda m, h, x: (
        F.normalize(h, dim=1) @ F.normalize(m.map.weight[:, :3], dim=1) * m.t.exp().clamp(max=100)
    ),
    "t + x": lambda m, h, x: (m.t + h).tanh(),
    "x - t": lambda m, h, x: (h - m.t).tanh(),
    "t - x": lambda m, h, x: (m.t - h).tanh(),
    "alpha": lambda m, h, x: torch.add(h, m.t, alpha=2.0).tanh(),
    "torch.mul": lambda m, h, x: torch.mul(h.tanh(), m.t),
    "in place": lambda m, h, x: (h.tanh() + 0).mul_(m.t).add_(m.t),
    "einsum": lambda m, h, x: torch.einsum("no,->no", h.tanh(), m.t),
    "expanded": lambda m, h, x: h.tanh() * m.t.expand(len(x), 3),
    "viewed": lambda m, h, x: h.tanh() * m.t.view(1, 1) + m.t[None],
    "where": lambda m, h, x: torch.where(x[:, :3] > 0, h.tanh(), m.t),
    "twice": lambda m, h, x: (h * m.t).tanh() * m.t,
    "power": lambda m, h, x: (h.sigmoid() + 1) ** m.t,
    "on a weight": lambda m, h, x: F.linear(x, m.map.weight * m.t, m.map.bias).tanh(),
    "stacked": lambda m, h, x: h.tanh() * torch.stack([m.t, m.t * m.t, m.t.sin()]),
    "slope": lambda m, h, x: F.prelu(h, m.t),
    "of a constant": lambda m, h, x: (h + torch.ones_like(h) * m.t).tanh(),
    "alone": lambda m, h, x: h.tanh() + torch.tensor([1.0, 2.0, 4.0], dtype=f64) * (2.0 * m.t),
}
EMPTY_USES = {
    "sum": (lambda m, h, x: h.tanh() + m.e.sum(), (0,)),
    "unused": (lambda m, h, x: h.tanh(), (3, 0)),
    "no inputs": (lambda m, h, x: h.tanh() + F.linear(x[:, :0], m.e), (3, 0)),
    "no outputs": (lambda m, h, x: torch.cat([h.tanh(), F.linear(x, m.e)], 1), (0, 4)),
    "scale": (lambda m, h, x: torch.cat([h.tanh(), x[:, :0] * m.e], 1), (0,)),
    "shift": (lambda m, h, x: torch.cat([h.tanh(), x[:, :0] + m.e], 1), (0,)),
    "tokens": (lambda m, h, x: m.map(torch.cat([m.e.expand(len(x), -1, -1), x[:, None]], 1)).tanh().sum(1), (1, 0, 4)),
    "bias": (lambda m, h, x: torch.cat([h.tanh(), F.linear(x, m.map.weight[:0], m.e)], 1), (0,)),
}


@pytest.mark.parametrize("use", SCALAR_USES)
def test_a_scalar_is_exact_in_every_object(use):
    require_exact(With(SCALAR_USES[use], t=number()), torch.randn(5, 4, dtype=f64))


@pytest.mark.parametrize("use", EMPTY_USES)
def test_a_parameter_without_elements_changes_nothing(use):
    forward, shape = EMPTY_USES[use]
    require_exact(With(forward, e=nothing(*shape)), torch.randn(5, 4, dtype=f64))


def test_modules_without_inputs_or_outputs():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3, dtype=f64), nn.Linear(1, 3, dtype=f64), nn.Linear(4, 1, dtype=f64)
            self.b.weight, self.c.weight, self.c.bias = nothing(3, 0), nothing(0, 4), nothing(0)

        def forward(self, x):
            return torch.cat([self.a(x).tanh() + self.b(x[:, :0]), self.c(x)], 1)

    require_exact(Narrow(), torch.randn(5, 4, dtype=f64))


# -- vectors -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["scalar", "empty"])
def model(request):
    if request.param == "scalar":
        return With(lambda m, h, x: h.tanh() * m.t + m.s * x[:, :3].sin() * m.s, t=number(), s=number(0.4))
    return With(lambda m, h, x: h.tanh() + F.linear(x[:, :0], m.e) + m.z.sum(), e=nothing(3, 0), z=nothing(0))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_vectors_by_name(model, batch):
    lc = nng.LayerCollection.from_model(model)
    v = nng.PVector.randn(lc, *batch, dtype=f64)
    named = v.to_dict()
    assert {name: t.shape for name, t in named.items()} == {
        name: (*batch, *p.shape) for name, p in model.named_parameters()
    }
    assert torch.equal(nng.PVector.from_dict(lc, named).flat(), v.flat())
    assert all(torch.equal(v[name], t) for name, t in named.items())


def test_vectors_of_a_model(model):
    v = nng.PVector.from_model(model)
    assert torch.equal(v.flat(), nn.utils.parameters_to_vector(model.parameters()))
    v.add_to(model)
    torch.testing.assert_close(nng.PVector.from_model(model).flat(), 2 * v.flat())
    model(torch.randn(3, 4, dtype=f64)).sum().backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    assert nng.PVector.from_grad(model).flat().shape == v.shape


def test_nothing_but_empty_parameters_is_refused():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nothing(0)

    with pytest.raises(nng.CollectionError, match="no parameter is left"):
        nng.LayerCollection.from_model(Empty())


# -- everything else that takes a model --------------------------------------------------------------------------------


@pytest.fixture
def data():
    return torch.randn(6, 4, dtype=f64), torch.arange(6) % 3


@pytest.mark.parametrize("kind", STORED)
def test_algebra_and_files(model, data, kind, tmp_path):
    r = representation(kind, model)
    m = nng.FIM(model, [data], r)
    dense, v = m.to_dense(), nng.PVector.from_model(model)
    nng.save(m, tmp_path / "m")
    assert torch.equal(nng.load(tmp_path / "m").to_dense(), dense)
    close(m.eigh()[0], torch.linalg.eigvalsh(dense), 1e-8)
    close(m.logdet(0.1), torch.logdet(dense + 0.1 * torch.eye(len(dense), dtype=f64)), 1e-8)
    close(
        (m + 2 * nng.FIM(model, [data], nng.PMatDense)).mv(v).flat(),
        dense @ v.flat() + 2 * nng.FIM(model, [data], nng.PMatDense).mv(v).flat(),
    )
    assert m.sample(2, 0.1).shape == (2, len(dense)) and m.to(torch.float32).mv(v).dtype == torch.float32
    for measure in (nng.GGN, nng.EmpiricalFIM):
        assert measure(model, [data], r, loss="cross_entropy").shape == dense.shape
    assert nng.FIM_MonteCarlo(model, [data], r).shape == dense.shape


@pytest.mark.parametrize("name", ENTRIES)
def test_hessian_and_covariance(model, data, name):
    kind = PARAMETER_SPACE[name]
    loss = lambda f, y: F.cross_entropy(f, y, reduction="none")
    h = reference.hessian(model, *data, loss)
    close(nng.Hessian(model, [data], kind, loss="cross_entropy").diag().flat(), h.diagonal())
    g = reference.loss_gradients(model, *data, loss)
    close(nng.GradientCovariance(model, [data], kind, loss="cross_entropy").diag().flat(), g.var(0, unbiased=False))


def test_kernels_and_maps(model, data):
    j = reference.jacobian(model, data[0])
    k = torch.einsum("cnd,emd->cnem", j, j)
    centred = j - j.mean(1, keepdim=True)
    f = nng.FVector(torch.randn(3, 6, dtype=f64))
    for kind in (nng.FMatDense, nng.FMatImplicit):
        expected = torch.einsum("cnd,emd,em->cn", centred, centred, f.tensor)
        close(nng.GramMatrix(model, [data], kind, centered=True).mv(f).tensor, expected)
    trace = nng.GramMatrix(model, [data], differentiable=True).trace()
    close(trace.detach(), torch.einsum("cncn->", k))
    ours = torch.autograd.grad(trace, list(model.parameters()), allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in ours)
    for kind in (nng.PushForwardDense, nng.PushForwardImplicit):
        jacobian = nng.Jacobian(model, [data], kind)
        close((jacobian.T @ jacobian).materialize(nng.PMatDense).to_dense(), torch.einsum("cnd,cne->de", j, j))
    close(
        nng.FIM(model, [data], nng.PMatEKFAC).rescaled(model, [data]).trace(),
        nng.FIM(model, [data], nng.PMatDense).trace(),
    )


def test_the_rest_of_the_library(model, data):
    x, y = data
    sample = mgs.sample_trace(model, x)
    close(sample, reference.jacobian(model, x).square().sum((0, 2)))
    for penalty in (
        mgs.trace_penalty(model, x),
        mgs.logdet_penalty(model, x, jitter=1.0),
        mgs.loss_gradient_penalty(model, x, y),
    ):
        penalty.backward()
    assert mgs.metrics(model, [data]).trace.isfinite().all()
    torch.testing.assert_close(linearized.Linearized(model)(x), model(x))
    assert analysis.stiffness(model, [data]).matrix.shape == (6, 6) and analysis.coherence(model, [data]).alpha > 0
    assert (
        analysis.label_alignment(model, [data], by_layer=True)
        and analysis.sharpness(model, [data], "cross_entropy") is not None
    )
    assert {row.name for row in nng.explain(model, data).rows} == {name for name, _ in model.named_parameters()}
    assert optim.winsorized_gradient(model, data, "cross_entropy", 0.0).shape == nng.PVector.from_model(model).shape


@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo", "exact"])
@pytest.mark.parametrize("kind", ["dense", "diag", "kfac", "ekfac"])
def test_optimizers(model, data, kind, fisher):
    if kind == "kfac":
        make = optim.KFAC
    elif kind == "ekfac":
        make = optim.EKFAC
    else:
        make = lambda m, **options: optim.NaturalGradient(m, representation(kind, m), **options)
    model = copy.deepcopy(model)
    optimizer = make(model, lr=1e-2, fisher=fisher, **({} if fisher == "empirical" else {"likelihood": "categorical"}))
    before = nng.PVector.from_model(model)
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.observe():
            F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    moved = nng.PVector.from_model(model) - before
    assert all(bool(t.abs().gt(0).any()) for t in moved.to_dict().values() if t.numel())
