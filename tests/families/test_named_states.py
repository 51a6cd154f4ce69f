"""Examples with a name: random and stateful passes, and results that depend on what was measured before."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng

from .named import Model, f64, inputs, jacobian_holds, plain
from .state import same, state_of

X = inputs(6)
PAIRS = [(X, torch.arange(6) % 3)]


# -- random and stateful passes ----------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Counts and averages in buffers; neither is read."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3, dtype=f64)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(3, dtype=f64))

    def forward(self, x):
        y = self.a(x)
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        return y


def spectral():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3).double())).train()


def drop_path(m, x):
    h = m.a(x).tanh()
    return m.b(h * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.8))


class Product(torch.autograd.Function):
    """An operation that those who watch torch's functions are not told of; nor are they of what a script does."""

    @staticmethod
    def forward(ctx, x, z):
        ctx.save_for_backward(z)
        return x * z

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


SCRIPT = torch.jit.script(nn.Linear(5, 5).double())

RANDOM = {
    "in a script": lambda m, x: m.b(m.a(x) * SCRIPT(torch.randn(5, dtype=f64))),
    "in a function of one's own": lambda m, x: m.b(Product.apply(m.a(x), torch.randn(5, dtype=f64))),
    "drop path": drop_path,
    "gumbel softmax": lambda m, x: m.b(F.gumbel_softmax(m.a(x))),
    "randn_like": lambda m, x: m.b(m.a(x) + torch.randn_like(m.a(x))),
    "multinomial": lambda m, x: m.b(m.a(x) * F.one_hot(m.a(x).detach().softmax(1).multinomial(1)[:, 0], 5)),
    "numpy": lambda m, x: m.b(m.a(x) * np.random.rand()),
    "python": lambda m, x: m.b(m.a(x) * random.random()),
}
MEASURES = {
    "FIM": lambda model: nng.FIM(model, [X], nng.PMatDiag),
    "KFAC": lambda model: nng.FIM(model, [X], nng.PMatKFAC),
    "EmpiricalFIM": lambda model: nng.EmpiricalFIM(model, PAIRS, nng.PMatDense, loss="cross_entropy"),
    "GramMatrix": lambda model: nng.GramMatrix(model, [X]),
    "Hessian": lambda model: nng.Hessian(model, PAIRS, nng.PMatDiag, loss="cross_entropy"),
    "trace_penalty": lambda model: nng.mgs.trace_penalty(model, X),
}


@pytest.mark.parametrize("noise", RANDOM)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_random_pass_is_a_mode_error_and_draws_are_put_back(noise, measure):
    model = Model(RANDOM[noise])
    before = state_of(model)
    with pytest.raises(nng.ModeError):
        MEASURES[measure](model)
    assert [name for name, value in state_of(model).items() if not same(value, before[name])] == []


@pytest.mark.parametrize("make", [Stateful, spectral], ids=lambda f: f.__name__)
@pytest.mark.parametrize("measure", MEASURES)
def test_measuring_does_not_change_buffers(make, measure):
    model = make()
    before = state_of(model)
    with contextlib.suppress(nng.NNGeomError):
        MEASURES[measure](model)
    assert [name for name, value in state_of(model).items() if not same(value, before[name])] == []


# -- what was measured before ------------------------------------------------------------------------------------------


def test_a_parameter_hook_that_comes_and_goes():
    model = Model(plain)
    jacobian_holds(model, X)
    handle = model.a.weight.register_hook(lambda g: 3 * g)
    jacobian_holds(model, X)
    handle.remove()
    jacobian_holds(model, X)


def test_a_tensor_hook_whose_closure_changes():
    factor = [1.0]

    def forward(m, x):
        h = m.a(x).tanh()
        if h.requires_grad:
            h.register_hook(lambda g: factor[0] * g)
        return m.b(h)

    model = Model(forward)
    for factor[0] in (1.0, -0.5, 0.0, 2.0):
        jacobian_holds(model, X)


class Turned(torch.autograd.Function):
    """The identity, or the examples turned round, by a flag."""

    @staticmethod
    def forward(ctx, x, flag):
        ctx.flag = flag
        return x.flip(0) if flag else x.clone()

    @staticmethod
    def backward(ctx, g):
        return (g.flip(0) if ctx.flag else g), None


def test_a_flag_of_a_custom_function():
    def forward(m, x):
        return m.b(Turned.apply(m.a(Turned.apply(x, m.flag)).tanh(), m.flag))

    model = Model(forward)
    for model.flag in (False, True, False):
        jacobian_holds(model, X)


def test_a_plain_attribute_that_changes_the_function():
    model = Model(lambda m, x: m.b(m.a(x).tanh()) / m.temperature)
    for model.temperature in (1.0, 3.0, 0.5):
        jacobian_holds(model, X)


# -- where the library is called ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def double_by_default():
    torch.set_default_dtype(f64)
    yield
    torch.set_default_dtype(torch.float32)


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64 by default": double_by_default,
    "anomaly detection": torch.autograd.detect_anomaly,
}
NUMBERS = {
    "Jacobian": lambda model: nng.Jacobian(model, [X]).tensor,
    "FIM": lambda model: nng.FIM(model, [X], nng.PMatDense).to_dense(),
    "EKFAC": lambda model: nng.FIM(model, [X], nng.PMatEKFAC).to_dense(),
    "GramMatrix": lambda model: nng.GramMatrix(model, [X]).tensor,
    "Hessian": lambda model: nng.Hessian(model, PAIRS, nng.PMatDense, loss="cross_entropy").to_dense(),
    "Hessian v": lambda model: product(nng.Hessian(model, PAIRS, loss="cross_entropy")),
    "FIM v": lambda model: product(nng.FIM(model, [X], nng.PMatImplicit)),
    "J v": lambda model: product(nng.Jacobian(model, [X], nng.PushForwardImplicit)),
}


def product(m):
    flat = torch.linspace(-1, 1, m.layer_collection.numel, dtype=f64)
    found = m.mv(nng.PVector.from_flat(m.layer_collection, flat))
    return found.flat() if isinstance(found, nng.PVector) else found.tensor


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("numbers", NUMBERS)
def test_what_is_switched_on_around_a_call_changes_nothing(numbers, around):
    model = Model(plain)
    want = NUMBERS[numbers](model)
    with AROUND[around](), contextlib.suppress(nng.NNGeomError):
        got = NUMBERS[numbers](model)
        assert float((got - want).norm() / want.norm()) < 1e-9
