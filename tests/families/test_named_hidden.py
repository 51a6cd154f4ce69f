"""Examples with a name: what others do to an example is multiplied by zero at first, and shows in no output."""

import pytest
import torch
from torch import nn

import nngeom as nng

from .named import Model, f64, inputs, jacobian_holds, plain
from .test_named_again import IMPLICIT, product
from .test_named_mixing import MEASURES

X = inputs(6)


class Gated(Model):
    """Two layers, and a gate, a branch and a table that are zero."""

    def __init__(self, forward):
        super().__init__(forward)
        self.gate, self.gates = nn.Parameter(torch.zeros((), dtype=f64)), nn.Parameter(torch.zeros(5, dtype=f64))
        self.branch, self.table = nn.Linear(4, 3, dtype=f64), nn.Parameter(torch.zeros(6, 3, dtype=f64))
        self.other = nn.Linear(4, 5, dtype=f64)
        for p in self.branch.parameters():
            nn.init.zeros_(p)


def detached(m, x):
    return m.b((m.a(x) + m.gate * m.other(x).mean(0).detach()).tanh())


def largest(m, x):
    return m.b((m.a(x) * (1 + m.gate * x.abs().max())).tanh())


HIDDEN = {
    "a mean": lambda m, x: m.b((m.a(x) + m.gate * m.other(x).mean(0)).tanh()),
    "a mean, detached": detached,
    "a mean of inputs": lambda m, x: m.b((m.a(x) + m.gates * x.mean(0).sum()).tanh()),
    "inputs less their mean": lambda m, x: plain(m, x) + m.branch(x - x.mean(0)),
    "the largest input": largest,
    "another order": lambda m, x: plain(m, x) + m.branch(x.flip(0)),
    "ranks": lambda m, x: plain(m, x) + m.table[x[:, 0].argsort().argsort()],
    "ranks, looked up": lambda m, x: plain(m, x) + nn.functional.embedding(x[:, 0].argsort().argsort(), m.table),
    "the mean, in a model of one size": lambda m, x: plain(m, x) + m.gate * x.view(6, 4).mean(0)[:3],
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("gate", [0.0, 1e-9])
@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_gate_of_zero_hides_is_refused(name, gate, measure):
    model = Gated(HIDDEN[name])
    with torch.no_grad():
        for p in (model.gate, model.gates, model.table, *model.branch.parameters()):
            p.fill_(gate)
    with pytest.raises(nng.CoverageError, match="mixes"):
        MEASURES[measure](model, (X,))


def opened(m):
    """As steps of training leave them."""
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3)


LATER = {
    "a head and a gate of zero": lambda m, x: plain(m, x) + m.branch((m.gate * x.mean(0)).expand_as(x)),
    "two gates": lambda m, x: m.b((m.a(x) + m.gate * m.gates * x.mean()).tanh()),
}


@pytest.mark.parametrize("write", [opened, lambda m: [p.data.add_(0.3) for p in m.parameters()]])
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", LATER)
def test_what_gradients_do_not_show_either_is_not_remembered(name, measure, write):
    """Rows are right as long as two factors are zero, and no longer."""
    model = Gated(LATER[name])
    jacobian_holds(model, X)
    MEASURES[measure](model, (X,))
    write(model)
    with pytest.raises(nng.CoverageError, match="mixes"):
        MEASURES[measure](model, (X,))


BEHIND = lambda m, x: plain(m, x - m.gate * x.mean(0))


class Buffered(Model):
    """A coefficient that is no parameter, as of a schedule."""

    def __init__(self, forward, frozen, value=0.0):
        super().__init__(forward)
        small = torch.tensor(value, dtype=f64)
        if frozen:
            self.gate = nn.Parameter(small, requires_grad=False)
        else:
            self.register_buffer("gate", small)


@pytest.mark.parametrize("value", [0.0, 1e-9, -1e-8])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("measure", MEASURES)
def test_coefficients_that_are_no_parameters_and_small(measure, frozen, value):
    model = Buffered(BEHIND, frozen, value)
    jacobian_holds(model, X)
    MEASURES[measure](model, (X,))
    model.gate.fill_(1.0)
    with pytest.raises(nng.CoverageError, match="mixes"):
        MEASURES[measure](model, (X,))


def holding(how):
    """A model with a gate of zero that is no parameter, held as ``how`` says, and what opens it."""
    zero, one = torch.zeros((), dtype=f64), torch.ones((), dtype=f64)
    if how == "an entry of a buffer":
        model = Model(lambda m, x: plain(m, m.gate[0] * x - m.gate[1] * x.mean(0)))
        model.register_buffer("gate", torch.tensor([1.0, 0.0], dtype=f64))
        return model, lambda: model.gate[1].fill_(1.0)
    if how == "in a list":
        model = Model(lambda m, x: plain(m, x - m.gates[0] * x.mean(0)))
        model.gates = [zero]
        return model, lambda: model.gates[0].fill_(1.0)
    model = Model(BEHIND)
    if how.startswith("a buffer"):
        model.register_buffer("gate", zero)
    else:
        model.gate = zero if how.startswith("an attribute") else nn.Parameter(zero, requires_grad=False)
    if how.endswith("replaced"):
        return model, lambda: setattr(model, "gate", nn.Parameter(one, False) if "parameter" in how else one)
    return model, lambda: model.gate.fill_(1.0)


HOW = ["an entry of a buffer", "in a list", "a buffer replaced", "an attribute", "an attribute replaced"]


@pytest.mark.parametrize("how", [*HOW, "a parameter replaced"])
def test_constants_are_known_by_what_they_hold(how):
    model, change = holding(how)
    for measure in MEASURES.values():
        measure(model, (X,))
    change()
    for measure in MEASURES.values():
        with pytest.raises(nng.CoverageError, match="mixes"):
            measure(model, (X,))


@pytest.mark.parametrize("write", [opened, lambda m: m.gate.data.fill_(1.0)])
@pytest.mark.parametrize("name", IMPLICIT)
def test_a_matrix_that_holds_its_model_looks_at_it_again(name, write):
    model = Gated(LATER["two gates"]) if write is opened else Buffered(BEHIND, frozen=False)
    for _ in range(2):  # the second time from memory
        held = IMPLICIT[name](model)
        product(held)
    write(model)
    with pytest.raises(nng.CoverageError, match="mixes"):
        product(held)


def counted(m, x):
    """The same numbers at every place and of every batch, but for how many examples there are."""
    return plain(m, x) + m.branch(x / len(x) + torch.eye(4, dtype=f64)[torch.arange(len(x)) % 4])


@pytest.mark.parametrize("function", [plain, counted, lambda m, x: plain(m, x) + m.gate * m.branch(x)])
def test_constants_behind_a_zero_may_depend_on_place_and_number(function):
    model = Gated(function)
    for name in MEASURES:
        MEASURES[name](model, (X,))
    jacobian_holds(model, X)
    assert nng.FIM(model, [X], nng.PMatDense).trace() > 0


def test_a_graph_whose_gradients_answer_is_remembered():
    model, calls = Gated(plain), []
    model.register_forward_hook(lambda *given: calls.append(1))
    nng.FIM(model, [X], nng.PMatDiag)
    first = len(calls)
    nng.FIM(model, [X], nng.PMatDiag)
    assert len(calls) - first < first
