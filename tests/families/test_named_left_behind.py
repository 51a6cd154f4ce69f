"""Examples with a name: what a forward pass leaves on a model, and what others do to it between two calls."""

import functools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import nngeom as nng

from .named import Model, f64, holds, inputs, jacobian_holds, plain, truth

X = inputs(6)
PAIRS = [(X, torch.arange(6) % 3)]
MEASURES = {
    "FIM": lambda model: nng.FIM(model, [X], nng.PMatDense),
    "implicit": lambda model: nng.FIM(model, [X], nng.PMatImplicit),
    "GramMatrix": lambda model: nng.GramMatrix(model, [X], nng.FMatDiag),
    "Hessian": lambda model: nng.Hessian(model, PAIRS, loss="cross_entropy"),
    "trace_penalty": lambda model: nng.mgs.trace_penalty(model, X),
}


def product(m):
    """``M v``, or ``J v``, of one vector."""
    flat = torch.linspace(-1, 1, m.layer_collection.numel, dtype=f64)
    found = m.mv(nng.PVector.from_flat(m.layer_collection, flat))
    return found.flat() if isinstance(found, nng.PVector) else found.tensor


# -- states that the next pass depends on ------------------------------------------------------------------------------


def carried(m, x):
    """The hidden units are carried on, as in a recurrent network of one size of batch."""
    h = (m.a(x) + m.state).tanh()
    m.state = h.detach()
    return m.b(h)


def counted(m, x):
    m.state = m.state + 1.0
    return m.b(m.a(x).tanh()) * m.state.mean()


def remembered(m, x):
    """A memory that is written in place."""
    h = m.a(x).tanh()
    m.state[:2] = h.detach()[:2]
    return m.b(h + m.state.mean(0))


def fixed(forward):
    """Of a model for one size of batch, which has no halves."""
    return lambda m, x: forward(m, x.view(6, 4))


def appended(m, x):
    """A list that grows."""
    m.log.append(float(x.sum()))
    return m.b(m.a(x).tanh()) * len(m.log)


def drawn(m, x):
    return m.b(m.a(x).tanh() + torch.tensor(m.random.normal()))


def drawn_by_python(m, x):
    return m.b(m.a(x).tanh()) * m.python.random()


STATES = {
    "hidden state": carried,
    "counter": counted,
    "memory": remembered,
    "counter, one size": fixed(counted),
    "list, one size": fixed(appended),
    "own generator": drawn,
    "own generator of Python": drawn_by_python,
    "own generator, one size": fixed(drawn),
}


def stateful(forward):
    model = Model(forward)
    model.state, model.log = torch.zeros(6, 5, dtype=f64), []
    model.random, model.python = np.random.default_rng(3), random.Random(3)
    return model


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("state", STATES)
def test_states_in_plain_attributes_are_refused_and_put_back(state, measure):
    model = stateful(STATES[state])
    held, numbers, python = model.state, model.random.bit_generator.state, model.python.getstate()
    with pytest.raises(nng.ModeError):
        MEASURES[measure](model)
    assert model.state is held and not held.any()
    assert model.random.bit_generator.state == numbers and model.python.getstate() == python


def test_what_is_left_is_named():
    with pytest.raises(nng.ModeError, match=r"attributes \['state'\] behind"):
        MEASURES["FIM"](stateful(carried))
    with pytest.raises(nng.ModeError, match="random numbers of NumPy"):
        MEASURES["FIM"](stateful(drawn))


# -- and such that it does not -----------------------------------------------------------------------------------------


def noted(m, x):
    m.last = m.a(x).tanh()
    return m.b(m.last)


def cached(m, x):
    if m.kept is None:
        m.kept = m.a.weight.T @ m.b.weight.T
    return (x @ m.kept).tanh() * m.a.bias.sum() + m.b.bias


def in_training(m, x):
    return m.train().b(m.a(x).tanh())


def fresh(model):
    model.kept = model.last = None
    return model.eval()


@pytest.mark.parametrize("forward", [noted, cached, in_training], ids=lambda f: f.__name__)
def test_attributes_without_consequence_are_put_back(forward):
    model = fresh(Model(forward))
    rows, fisher = truth(model, X).rows, truth(Model(plain) if forward is not cached else fresh(model), X).fisher
    fresh(model)
    assert torch.allclose(nng.Jacobian(model, [X]).tensor, rows, rtol=1e-8)
    m = nng.FIM(model, [X], nng.PMatImplicit)
    flat = torch.linspace(-1, 1, m.layer_collection.numel, dtype=f64)
    for _ in range(2):
        assert torch.allclose(product(m), fisher @ flat, rtol=1e-8)
    assert model.kept is None and model.last is None and not model.training and not model.a.training


def test_weights_cached_outside_are_right_or_refused():
    model = nn.Sequential(
        parametrizations.orthogonal(nn.Linear(4, 5, dtype=f64)), nn.Tanh(), nn.Linear(5, 3, dtype=f64)
    )
    t = truth(model, X)
    with parametrize.cached():
        holds(lambda: nng.Jacobian(model, [X]).tensor, lambda: t.rows)
        holds(lambda: product(nng.FIM(model, [X], nng.PMatImplicit)), lambda: t.fisher @ torch.linspace(-1, 1, 48))
        with pytest.raises(nng.UnsupportedError, match="kept from one call to the next"):
            product(nng.Jacobian(model, [X], nng.PushForwardImplicit))
    other = Model(lambda m, x: (x @ weight()).tanh() + m.b.bias)
    weight = functools.lru_cache(lambda: other.a.weight.T @ other.b.weight.T)
    jacobian_holds(other, X)


# -- parameters that a pass writes -------------------------------------------------------------------------------------


def clipped(m, x):
    with torch.no_grad():
        m.a.weight.clamp_(-0.1, 0.1)
    return plain(m, x)


def decayed(m, x):
    m.a.weight.data.mul_(0.9)
    return plain(m, x)


def normalised(m, x):
    m.a.weight.data = nn.functional.normalize(m.a.weight.data)
    return plain(m, x)


def written_by_part(m, x):
    with torch.no_grad():
        m.a.weight[0] *= 0.5
        m.b.bias[1:2] = 3.0
    return plain(m, x)


def initialised(m, x):
    """Scaled by the first batch."""
    h = m.a(x)
    if not m.state:
        m.state = True
        with torch.no_grad():
            m.a.bias.copy_(-h.mean(0))
    return m.b((h + m.a.bias).tanh())


def stepped(m, x):
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    with torch.enable_grad():
        plain(m, x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return plain(m, x)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    "forward", [clipped, decayed, normalised, written_by_part, initialised, stepped], ids=lambda f: f.__name__
)
def test_parameters_written_in_a_pass_are_put_back_and_it_is_refused(forward, measure):
    model = Model(forward)
    model.state = False
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    objects = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(nng.ModeError, match="changes the parameters"):
        MEASURES[measure](model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [p.data_ptr() for p in model.parameters()] == objects and model.state is False


def test_writing_what_is_there_is_no_change():
    model = Model(clipped)
    model(X)
    jacobian_holds(model, X)


def test_a_table_that_is_renormalised_by_a_pass():
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5, dtype=f64), nn.Flatten(), nn.Linear(8, 3, dtype=f64))
    x, before = torch.arange(6).view(3, 2), model[0].weight.detach().clone()
    with pytest.raises(nng.ModeError, match="weight"):
        nng.FIM(model, [x], nng.PMatDense)
    assert torch.equal(model[0].weight, before)
    model(x)
    jacobian_holds(model, x)


# -- what others do between two products -------------------------------------------------------------------------------

IMPLICIT = {
    "FIM": lambda model: nng.FIM(model, [X], nng.PMatImplicit),
    "Hessian": lambda model: nng.Hessian(model, PAIRS, loss="cross_entropy"),
    "Jacobian": lambda model: nng.Jacobian(model, [X], nng.PushForwardImplicit),
    "kernel": lambda model: nng.GramMatrix(model, [X], nng.FMatImplicit),
}


def multiplied(m):
    return m.mv(nng.FVector(torch.ones(3, 6, dtype=f64))) if isinstance(m, nng.FMatImplicit) else product(m)


def exchange(model):
    model.a = nn.Linear(4, 5, dtype=f64)


def exchange_one(model):
    model.b.weight = nn.Parameter(torch.zeros(3, 5, dtype=f64))


def freeze(model):
    model.a.requires_grad_(False)


@pytest.mark.parametrize("change", [exchange, exchange_one, freeze], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", IMPLICIT)
def test_parameters_exchanged_or_frozen_after_a_matrix_was_made(name, change):
    model = Model(plain)
    m = IMPLICIT[name](model)
    multiplied(m)
    change(model)
    with pytest.raises(nng.CollectionError, match="since this was built"):
        multiplied(m)
    multiplied(IMPLICIT[name](model))


def test_values_may_change():
    model = Model(plain)
    m = nng.FIM(model, [X], nng.PMatImplicit)
    for p in model.parameters():
        p.data = torch.randn_like(p)
    flat = torch.linspace(-1, 1, m.layer_collection.numel, dtype=f64)
    assert torch.allclose(product(m), truth(model, X).fisher @ flat, rtol=1e-8)


# -- functions registered on gradients ---------------------------------------------------------------------------------


def test_products_under_a_hook_that_comes_and_goes():
    """Forward mode runs no hook, and the graph with one is that without."""
    function = [None]

    def forward(m, x):
        h = m.a(x).tanh()
        if function[0] is not None and h.requires_grad:
            h.register_hook(function[0])
        return m.b(h)

    model = Model(forward)
    lc = nng.LayerCollection.from_model(model)
    flat = torch.linspace(-1, 1, lc.numel, dtype=f64)
    v, u = nng.PVector.from_flat(lc, flat), nng.FVector(torch.linspace(0, 1, 18, dtype=f64).view(3, 6))
    for function[0] in (None, lambda g: 3 * g, lambda g: -g, None, lambda g: 0 * g):
        rows = truth(model, X).rows
        jv = nng.Jacobian(model, [X], nng.PushForwardImplicit).mv(v).tensor
        assert torch.allclose(jv, rows @ flat, rtol=1e-8, atol=1e-12)
        k = nng.GramMatrix(model, [X], nng.FMatImplicit).mv(u).tensor
        assert torch.allclose(k, rows @ torch.einsum("knd,kn->d", rows, u.tensor), rtol=1e-8, atol=1e-12)


def on_a_parameter(f):
    model = Model(plain)
    model.a.weight.register_hook(f)
    return model


def on_a_tensor(f):
    def forward(m, x):
        h = m.a(x).tanh()
        if h.requires_grad:
            h.register_hook(f)
        return m.b(h)

    return Model(forward)


def on_a_module(f):
    model = Model(plain)
    model.b.register_full_backward_hook(lambda module, inputs, outputs: (f(inputs[0]),))
    return model


NOT_LINEAR = {
    "clip": lambda g: g.clamp(-0.01, 0.01),
    "normalise": lambda g: g / (g.norm() + 1e-3),
}


@pytest.mark.parametrize("f", NOT_LINEAR)
@pytest.mark.parametrize("where", [on_a_parameter, on_a_tensor, on_a_module], ids=lambda f: f.__name__)
def test_hooks_that_are_not_linear_are_refused(where, f):
    model = where(NOT_LINEAR[f])
    with pytest.raises(nng.CoverageError, match="registered on gradients"):
        nng.FIM(model, [X], nng.PMatDense)
