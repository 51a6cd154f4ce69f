"""Measuring in forward mode leaves every parameter where it was: modules with two names, tied weights, errors."""

import pytest
import reference
import torch
from cases import CASES, build
from small import Function, model_of, normal
from torch import nn

import nngeom as nng
from nngeom.capture.exchanged import exchanged
from nngeom.linearized import Linearized


def twice_named() -> nn.Module:
    """One layer under two names, its weight in another layer as well."""
    torch.manual_seed(0)
    first, third, last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
    third.weight = first.weight
    forward = lambda m, x: m.last(m.third(m.second(m.first(x).tanh()).tanh()).tanh())
    return Function(forward, first=first, second=first, third=third, last=last).double()


def places(model: nn.Module) -> list[tuple[str, int]]:
    """Every name of every parameter, and which object it is."""
    return [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]


READINGS = {
    "matrix": lambda m, x: nng.FIM(m, [(x,)], nng.PMatImplicit).mv(nng.PVector.from_model(m)),
    "kernel": lambda m, x: nng.GramMatrix(m, [(x,)], nng.FMatImplicit).mv(nng.FVector(normal(2, len(x)))),
    "push-forward": lambda m, x: nng.Jacobian(m, [(x,)], nng.PushForwardImplicit).mv(nng.PVector.from_model(m)),
}


@pytest.mark.parametrize("name", READINGS)
def test_modules_of_two_names_keep_their_parameters(name):
    model, x = twice_named(), normal(4, 3)
    before = places(model)
    READINGS[name](model, x)
    assert places(model) == before and all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert model.third.weight is model.first.weight is model.second.weight


def test_products_of_modules_of_two_names_are_right():
    model, x = twice_named(), normal(4, 3)
    v = nng.PVector.randn(nng.LayerCollection.from_model(model), dtype=torch.float64)
    expected = reference.fisher(model, x) @ v.flat()
    for _ in range(2):  # the second time on what the first left
        f = nng.FIM(model, [(x,)], nng.PMatImplicit)
        torch.testing.assert_close(f.mv(v).flat(), expected, rtol=1e-10, atol=1e-12)


def test_linearised_modules_of_two_names():
    model, x = twice_named(), normal(4, 3)
    linear = Linearized(model)
    before = places(linear.model)
    delta = nng.PVector.randn(nng.LayerCollection.from_model(model), dtype=torch.float64)
    f0, j = model(x), reference.jacobian(model, x)  # (c, n, d)
    for _ in range(2):
        assert torch.allclose(linear(x), f0, rtol=1e-12) and places(linear.model) == before
    for p, change in zip(linear.parameters(), delta.to_dict().values(), strict=True):
        p.data += change
    torch.testing.assert_close(linear(x), f0 + (j @ delta.flat()).T, rtol=1e-10, atol=1e-12)
    assert places(linear.model) == before


@pytest.mark.parametrize("name", CASES)
def test_products_leave_every_case_as_it_was(name):
    case = build(name)
    before = places(case.model)
    nng.Jacobian(case.model, case.loader, nng.PushForwardImplicit).mv(nng.PVector.from_model(case.model))
    assert places(case.model) == before


def test_parameters_come_back_after_errors():
    model = model_of(nn.Linear(2, 2))
    before = places(model)
    with pytest.raises(ZeroDivisionError), exchanged(model, {"0.weight": normal(2, 2)}):
        assert places(model) != before
        raise ZeroDivisionError
    assert places(model) == before


def test_what_is_exchanged_is_seen_under_every_name():
    model, other = twice_named(), normal(3, 3)
    with exchanged(model, {"first.weight": other}):
        assert model.first.weight is model.second.weight is model.third.weight is other
