"""Examples with a name: a model that was measured, and mixes examples by the time it is measured again.

Inputs have no gradient: what becomes of them is not in the graph, which is the same before and after.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng

from .named import f64, inputs, truth

X = inputs(6)
Y = torch.arange(6) % 3
SWITCH = [False]


class Net(nn.Module):
    """Inputs less a constant, or less the mean of the batch where any of the switches is set."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 5, dtype=f64), nn.Linear(5, 3, dtype=f64)
        self.flag, self.settings, self.first, self.constant = False, {"flag": False}, None, torch.zeros(4, dtype=f64)
        self.eval()

    def less(self, x):
        return x - self.constant

    def forward(self, x):
        mixes = self.training or self.flag or self.settings["flag"] or SWITCH[0]
        x = x - x.mean(0) if mixes else self.less(x)
        return self.b(self.a(x if self.first is None else self.first(x)).tanh())


class Own(Net):
    """A class for one test."""


class Mean(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def set_globally(model):
    SWITCH[0] = True


def set_in_a_dictionary(model):
    model.settings["flag"] = True


def patched(model):
    weight, bias = model.a.weight, model.a.bias
    model.a.forward = lambda x: F.linear(x - x.mean(0), weight, bias)


def method_patched(model):
    type(model).less = lambda self, x: x - x.mean(0)


def other_class(model):
    model.a.__class__ = type("Centred", (nn.Linear,), {"forward": lambda self, x: F.linear(x - x.mean(0), self.weight)})


CHANGES = {
    "training mode": lambda m: m.train(),
    "attribute": lambda m: setattr(m, "flag", True),
    "attribute in a dictionary": set_in_a_dictionary,
    "global": set_globally,
    "hook": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(0),)),
    "hook of a layer": lambda m: m.a.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(0),)),
    "module": lambda m: setattr(m, "first", Mean()),
    "function": lambda m: setattr(m, "first", lambda x: x - x.mean(0)),
    "forward": patched,
    "method of the class": method_patched,
    "class": other_class,
}
MEASURES = {
    "Jacobian": lambda m: nng.Jacobian(m, [X]),
    "FIM": lambda m: nng.FIM(m, [X], nng.PMatDiag),
    "KFAC": lambda m: nng.FIM(m, [(X[:3],), (X[3:],)]),
    "kernel": lambda m: nng.GramMatrix(m, [X], nng.FMatDiag),
    "Hessian": lambda m: nng.Hessian(m, [(X, Y)], nng.PMatDiag, loss="cross_entropy"),
    "trace penalty": lambda m: nng.mgs.trace_penalty(m, X),
}
IMPLICIT = {
    "FIM": lambda m: nng.FIM(m, [X], nng.PMatImplicit),
    "GGN": lambda m: nng.GGN(m, [(X, Y)], nng.PMatImplicit, loss="cross_entropy"),
    "Hessian": lambda m: nng.Hessian(m, [(X, Y)], loss="cross_entropy"),
    "Jacobian": lambda m: nng.Jacobian(m, [X], nng.PushForwardImplicit),
    "kernel": lambda m: nng.GramMatrix(m, [X], nng.FMatImplicit),
}


def product(m):
    if isinstance(m, nng.FMatImplicit):
        return m.mv(nng.FVector(torch.ones(3, 6, dtype=f64))).tensor
    return m.mv(nng.PVector.randn(m.layer_collection, dtype=f64))


@pytest.fixture
def unset():
    less = Own.__dict__.get("less")
    yield
    SWITCH[0] = False
    if less is None and "less" in Own.__dict__:
        del Own.less


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_measured_before_is_measured_again(change):
    model = Own()
    for measure in MEASURES.values():
        measure(model)
    CHANGES[change](model)
    for name, measure in MEASURES.items():
        with pytest.raises(nng.CoverageError, match="mixes"):
            measure(model)
            pytest.fail(f"{name} was measured")


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("change", CHANGES)
def test_products_with_a_matrix_that_holds_its_model(change):
    model = Own()
    held = {name: make(model) for name, make in IMPLICIT.items()}
    for m in held.values():
        product(m)
    CHANGES[change](model)
    for name, m in held.items():
        with pytest.raises(nng.CoverageError, match="mixes"):
            product(m)
            pytest.fail(f"the product of {name} went through")
        if name == "FIM":
            for of_it in (m.trace, m.diag, lambda m=m: product(m["a"]), lambda m=m: m["a"].trace()):
                with pytest.raises(nng.CoverageError, match="mixes"):
                    of_it()


def test_noise_that_comes_later():
    model = Own()
    held = {name: make(model) for name, make in IMPLICIT.items()}
    model.first = nn.Dropout()
    model.first.train()
    for m in held.values():
        with pytest.raises(nng.ModeError):
            product(m)


def test_a_function_that_is_another_one():
    model = Own()
    made = lambda mixes: lambda x: model(x - x.mean(0)) if mixes else model(x - 0.0)
    for measure in (nng.Jacobian, nng.FIM, nng.GramMatrix):
        measure(model, [X], function=made(False))
        measure(model, [X], function=lambda x: model(x))
        for function in (made(True), lambda x: model(x - x.mean(0))):
            with pytest.raises(nng.CoverageError, match="mixes"):
                measure(model, [X], function=function)


def test_a_table_with_a_row_for_each_example():
    """Of another length it is what all examples share."""
    model, function = Own(), lambda x, table: model(x + table.mean(0))
    nng.Jacobian(model, [(X, inputs(9))], function=function)
    with pytest.raises(nng.CoverageError, match="mixes"):
        nng.Jacobian(model, [(X, inputs(6, seed=3))], function=function)


class Counting(Own):
    """Counts its calls, which changes nothing."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


@pytest.mark.parametrize("kind", [Own, Counting])
def test_what_stays_as_it_was_is_not_asked_again(kind, monkeypatch):
    from nngeom.pullback import captured_pass

    asked, real = [], captured_pass.require_separate
    monkeypatch.setattr(captured_pass, "require_separate", lambda *a, **k: (asked.append(1), real(*a, **k)))
    model = kind()
    held = nng.FIM(model, [X], nng.PMatImplicit)
    for _ in range(3):
        product(held)
    first = len(asked)
    assert first >= 1
    for _ in range(3):
        product(held)
    assert len(asked) == first
    if kind is Own:
        for _ in range(2):
            nng.FIM(model, [X], nng.PMatDiag, function=lambda x: model(x))
        assert len(asked) == first + 1  # of another function, once


def test_other_things_that_are_right():
    """Numbers of the model as it is now."""
    model = Own()
    held = nng.FIM(model, [X], nng.PMatImplicit)
    for change in (lambda: setattr(model, "first", nn.Tanh()), lambda: model.settings.update(other=3)):
        product(held)
        change()
        flat = torch.linspace(-1, 1, held.layer_collection.numel, dtype=f64)
        got = held.mv(nng.PVector.from_flat(held.layer_collection, flat)).flat()
        torch.testing.assert_close(got, truth(model, X).fisher @ flat, rtol=1e-8, atol=1e-12)
