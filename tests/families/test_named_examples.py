"""Examples with a name: proofs that nothing could be seen by, data that places examples, few examples standing for many."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng

from .blocks import Force, Unseen
from .named import Model, f64, holds, inputs, jacobian_holds, truth
from .placings import Permuted
from .pools import POOLS

X = inputs(6)


# -- a comparison of zeros proves nothing ----------------------------------------------------------------------------


def plain(m, x):
    return m.b(m.a(x).tanh())


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


# -- the data places examples ----------------------------------------------------------------------------------------


def expert_dispatch(m, x):
    one_hot = F.one_hot((x[:, 0] > 0).long(), 2)
    slot = (one_hot.cumsum(0) - 1).masked_fill(one_hot == 0, -1)
    dispatch = (slot[:, :, None] == torch.arange(len(x))).to(x.dtype)
    y = m.a(torch.einsum("nec,nm->ecm", dispatch, x)).tanh()
    return m.b(torch.einsum("nec,ecm->nm", dispatch, y))


def permutation_matrix(m, x):
    p = torch.eye(len(x), dtype=x.dtype)[x[:, 0].argsort()]
    return m.b(p.T @ m.a(p @ x).tanh())


def where_flipped(m, x):
    c = (x[:, :1] + x[:, :1].flip(0)) > 0
    y = m.a(torch.where(c, x, x.flip(0))).tanh()
    return m.b(torch.where(c, y, y.flip(0)))


def custom_permutation(m, x):
    order = x[:, 0].argsort()
    return m.b(Permuted.apply(m.a(Permuted.apply(x, order)).tanh(), order.argsort()))


def sorted_and_back(m, x):
    order = x[:, 0].argsort()
    return m.b(m.a(x[order]).tanh()[order.argsort()])


MOVERS = [expert_dispatch, permutation_matrix, where_flipped, custom_permutation, sorted_and_back]


@pytest.mark.parametrize("mover", MOVERS, ids=lambda f: f.__name__)
def test_one_batch_in_order_and_another_that_is_not(mover):
    model, other = Model(mover), inputs(6, seed=2)
    ordered = torch.cat([X[:, :1].abs().sort(0).values, X[:, 1:]], 1)  # sorted, of one expert, above zero
    jacobian_holds(model, ordered)
    jacobian_holds(model, other)
    jacobian_holds(model, ordered, other, X)


@pytest.mark.parametrize("pool", POOLS)
def test_tokens_pooled_into_examples(pool):
    def readout(m, x):
        kept = x[..., 0] > -0.5
        return m.b(POOLS[pool](m.a(x[kept]).tanh(), kept.nonzero()[:, 0], len(x)))

    model = Model(readout, hidden=4)
    full = inputs(5, 3, 4).abs()
    jacobian_holds(model, full)
    for seed in (2, 3):
        jacobian_holds(model, inputs(5, 3, 4, seed=seed))


# -- as many weights as examples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
@pytest.mark.parametrize("mover", MOVERS, ids=lambda f: f.__name__)
def test_any_two_examples_that_change_places_are_told_apart(mover, n):
    for seed in range(6):
        jacobian_holds(Model(mover), inputs(n, seed=seed))


def test_the_mixing_of_later_examples_is_seen():
    """Examples 4..7 of 8 are mixed, the others are not."""

    def mixed(m, x):
        h = m.a(x).tanh()
        return m.b(torch.cat([h[:4], h[4:] + 0.1 * h[4:].roll(1, 0)]))

    jacobian_holds(Model(mixed), inputs(8))


def test_a_readout_of_many_small_graphs():
    """Nodes of eight graphs in one table, in no order."""

    def readout(m, x):
        rows, owner = x.flatten(0, 1), torch.arange(len(x)).repeat_interleave(x.shape[1])
        order = rows[:, 0].argsort()
        h = m.a(rows[order]).tanh()
        return m.b(h.new_zeros(len(x), 5).index_add(0, owner[order], h))

    jacobian_holds(Model(readout), inputs(8, 3, 4))


# -- few examples stand for the batch --------------------------------------------------------------------------------


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
    holds(lambda: nng.GramMatrix(model, [X.to(dtype)], layer_collection=nng.LayerCollection.from_model(model, "c.weight")).trace(), want.square().sum(), tolerance)


# -- a small budget changes nothing ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::nngeom.MemoryWarning")
@pytest.mark.parametrize("budget", [1, 500, 2_000, 20_000])
def test_examples_scaled_by_the_largest_of_the_batch(budget):
    def scaled(m, x):
        length = x[:, :1].abs()
        return m.b(m.a(x).tanh() * (length / length.max()))

    jacobian_holds(Model(scaled), inputs(8), memory_budget=budget)
