"""Examples with a name: proofs in which nothing could be seen, and few examples that stood for many."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng

from .blocks import Force, Unseen
from .named import Model, f64, holds, inputs, jacobian_holds, truth

X = inputs(6)


# -- a comparison of zeros proves nothing ------------------------------------------------------------------------------


def half_seen(m, x):
    """A use that is seen, and another of the same weight that is not."""
    h = m.a(x) + m.coefficient * Unseen.apply(x.sin(), m.a.weight)
    return m.b(h.tanh())


class ForceField(nn.Module):
    """``-dE/dx``: every weight is used in the energy and again in its gradient."""

    def __init__(self, head: str):
        super().__init__()
        torch.manual_seed(0)
        self.force, self.zero_at_first = Force().double(), head

    @property
    def head(self) -> nn.Parameter:
        return self.force.get_submodule(self.zero_at_first).weight

    def forward(self, x):
        return self.force(x)


def test_a_force_field_whose_head_was_zero_when_it_was_first_measured():
    model = ForceField("energy")
    with torch.no_grad():
        weight = model.head.clone()
        model.head.zero_()
    nng.GramMatrix(model, [X], nng.FMatDiag)
    with torch.no_grad():
        model.head.copy_(weight)
    jacobian_holds(model, X)


def test_the_trace_penalty_of_a_force_field_whose_head_was_zero():
    model = ForceField("energy")
    with torch.no_grad():
        weight = model.head.clone()
        model.head.zero_()
    nng.mgs.trace_penalty(model, X)
    with torch.no_grad():
        model.head.copy_(weight)
    holds(lambda: nng.mgs.trace_penalty(model, X).detach(), lambda: truth(model, X).trace)


def test_a_zero_initialised_head_then_trained():
    model = Model(half_seen)
    with torch.no_grad():
        model.b.weight.zero_()
    jacobian_holds(model, X)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(X), torch.arange(6) % 3).backward()
        optimizer.step()
    optimizer.zero_grad()
    jacobian_holds(model, X)


def test_a_residual_gate_that_starts_at_zero():
    model = Model(lambda m, x: m.b(m.a(x) + m.gate * Unseen.apply(x, m.a.weight)))
    model.gate = nn.Parameter(torch.zeros(1, dtype=f64))
    jacobian_holds(model, X)
    with torch.no_grad():
        model.gate.fill_(0.8)
    jacobian_holds(model, X)


def test_a_coefficient_that_is_warmed_up_from_zero():
    model = Model(half_seen)
    for model.coefficient in (0.0, 0.5, 1.0):
        jacobian_holds(model, X)


def test_a_relu_that_is_dead_on_the_first_batch():
    model = Model(lambda m, x: m.b(m.a(x) + Unseen.apply(x, m.a.weight) * F.relu(x.sum(1, keepdim=True))))
    shut = -X.abs()
    jacobian_holds(model, shut)
    jacobian_holds(model, X)
    jacobian_holds(Model(model.function), shut, X.abs())


def test_equal_examples_at_first():
    model = Model(lambda m, x: m.b(m.a(x[x[:, 0].argsort()]).tanh()[x[:, 0].argsort().argsort()]))
    jacobian_holds(model, X[:1].repeat(6, 1))
    jacobian_holds(model, X)


# -- few examples stand for the batch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 7, 12])
def test_an_unseen_use_that_is_open_for_some_examples(n):
    def gated(m, x):
        return m.b(m.a(x) + F.relu(x.sum(1, keepdim=True) - 1) * Unseen.apply(x, m.a.weight))

    for seed in range(4):
        jacobian_holds(Model(gated), inputs(n, seed=seed))


def test_an_unseen_use_of_one_example_in_the_middle():
    def one(m, x):
        return m.b(m.a(x) + (x[:, :1] > 9) * Unseen.apply(x.sin(), m.a.weight))

    x = inputs(9)
    x[3, 0] = 10
    jacobian_holds(Model(one), x)


def test_an_unseen_use_of_one_percent_in_float32():
    def little(m, x):
        return m.b((m.a(x) + 0.009 * Unseen.apply(x.sin(), m.a.weight)).tanh())

    model, x = Model(little).float(), X.float()
    want = truth(Model(little), X).rows
    holds(lambda: nng.Jacobian(model, [x]).tensor, want, tolerance=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_a_layer_with_gradients_far_below_those_of_others(dtype, tolerance):
    def faint(m, x):
        return m.b(m.a(x)) + 2e-5 * (m.c(x) + Unseen.apply(x.sin(), m.c.weight))

    model = Model(faint)
    model.c = nn.Linear(4, 3, dtype=f64)
    only = slice(-15, -3)  # of c's weight
    want = truth(model, X).rows[..., only]
    model.to(dtype)
    holds(lambda: nng.Jacobian(model, [X.to(dtype)]).tensor[..., only], want, tolerance)
    selected = nng.LayerCollection.from_model(model, "c.weight")
    trace = lambda: nng.GramMatrix(model, [X.to(dtype)], layer_collection=selected).trace()
    holds(trace, want.square().sum(), tolerance)


# -- a small budget changes nothing ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::nngeom.MemoryWarning")
@pytest.mark.parametrize("budget", [1, 500, 2_000, 20_000])
def test_examples_scaled_by_the_largest_of_the_batch(budget):
    def scaled(m, x):
        length = x[:, :1].abs()
        return m.b(m.a(x).tanh() * (length / length.max()))

    jacobian_holds(Model(scaled), inputs(8), memory_budget=budget)
