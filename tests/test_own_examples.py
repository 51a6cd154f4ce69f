"""Losses that are not of each example's own outputs and targets are refused; changed ones of torch are seen."""

import contextlib
import functools
import random

import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng

f64 = torch.float64
ce = functools.partial(F.cross_entropy, reduction="none")


def problem(n, outputs=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    return model, torch.randn(n, 3, dtype=f64)


TAKERS = {
    "EmpiricalFIM": lambda m, b, loss: nng.EmpiricalFIM(m, b, nng.PMatDiag, loss=loss),
    "GGN": lambda m, b, loss: nng.GGN(m, b, nng.PMatDiag, loss=loss),
    "GGN v": lambda m, b, loss: nng.GGN(m, b, nng.PMatImplicit, loss=loss).mv(nng.PVector.from_model(m)),
    "Hessian": lambda m, b, loss: nng.Hessian(m, b, nng.PMatDiag, loss=loss),
    "kernel": lambda m, b, loss: nng.GramMatrix(m, b, loss=loss),
}
OTHERS = {  # outputs, targets, loss
    "targets that broadcast": (1, lambda n: torch.arange(n).double(), lambda f, y: (f - y).square().sum(1)),
    "a frequency of labels": (
        4,
        lambda n: torch.arange(n) * 3 % 4 % 2,
        lambda f, y: ce(f, y) / (y[:, None] == y).sum(1),
    ),
    "the label of a neighbour": (4, lambda n: torch.arange(n) % 4, lambda f, y: ce(f, y.roll(1))),
    "a mean without gradient": (4, lambda n: torch.arange(n) % 4, lambda f, y: ce(f - f.mean(0).detach(), y)),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("n", [3, 6])
@pytest.mark.parametrize("name", OTHERS)
def test_other_examples_have_no_part_in_a_loss(name, n, taker):
    outputs, targets, loss = OTHERS[name]
    model, x = problem(n, outputs)
    with pytest.raises(nng.ArgumentError, match="mixes examples"):
        TAKERS[taker](model, [(x, targets(n))], loss)


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("fixed", [False, True], ids=["any size", "one size"])
def test_random_losses_are_refused_and_random_numbers_stay(taker, fixed):
    model, x = problem(6)
    factor = lambda f: torch.rand((6,) if fixed else len(f), dtype=f.dtype)
    before = torch.get_rng_state()
    with pytest.raises(nng.ArgumentError, match="changes from one call to the next"):
        TAKERS[taker](model, [(x, torch.arange(6) % 4)], lambda f, y: factor(f) * ce(f, y))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(
    "draw", [torch.rand, np.random.rand, lambda n: random.random()], ids=["torch", "numpy", "python"]
)
@pytest.mark.parametrize("part", [0.0, 1.0])
def test_what_losses_draw_leaves_random_states_as_they_were(draw, part, taker):
    model, x = problem(6)
    loss = lambda f, y: ce(f, y) * (1 + part * float(torch.as_tensor(draw(1)).sum()) * torch.arange(1, len(f) + 1))
    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1:3])
    before = states()
    refused = pytest.raises(nng.ArgumentError) if part else contextlib.nullcontext()
    with refused:
        TAKERS[taker](model, [(x, torch.arange(6) % 4)], loss)
    torch_state, python_state, (words, place) = states()
    assert (torch_state, python_state) == before[:2]
    assert place == before[2][1] and (words == before[2][0]).all()


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("name", ["detached", "counted"])
def test_losses_without_a_gradient_are_refused(name, taker):
    loss = {"detached": lambda f, y: ce(f.detach(), y), "counted": lambda f, y: (f.argmax(1) != y).double()}[name]
    model, x = problem(6)
    with pytest.raises(nng.CoverageError, match="differentiable operations"):
        TAKERS[taker](model, [(x, torch.arange(6) % 4)], loss)


@pytest.mark.parametrize("margin", [1.0, 15.0, 35.0])
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_rounding_of_confident_outputs_mixes_nothing(margin, dtype):
    torch.manual_seed(0)
    x, y = torch.randn(7, 4, dtype=dtype), torch.arange(7) % 4
    x[torch.arange(7), y] += margin
    model = nn.Linear(4, 4).to(dtype)
    model.weight.data, model.bias.data = torch.eye(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    for loss in (ce, lambda f, y: -f.softmax(1).gather(1, y[:, None])[:, 0].log()):
        found = nng.EmpiricalFIM(model, [(x, y)], nng.PMatDense, loss=lambda f, y, loss=loss: loss(f, y)).to_dense()
        expected = nng.EmpiricalFIM(model, [(x, y)], nng.PMatDense, loss="cross_entropy").to_dense()
        assert bool(expected.any())
        error = (found - expected).double().norm() / expected.double().norm()
        assert float(error) < (1e-5 if dtype == torch.float32 else 1e-10)


def test_modules_of_torch_that_were_changed_are_what_they_became():
    model, x = problem(6)
    y = torch.arange(6) % 4
    changed = nn.CrossEntropyLoss()
    changed.forward = lambda f, y: 3 * ce(f, y)
    found = nng.EmpiricalFIM(model, [(x, y)], nng.PMatDense, loss=changed).to_dense()
    rows = reference.jacobian(model, x)
    g = torch.einsum("knd,nk->nd", rows, 3 * (model(x).softmax(1) - F.one_hot(y, 4)).detach())
    torch.testing.assert_close(found, g.T @ g / 6)
    hooked = nn.CrossEntropyLoss(reduction="none")
    hooked.register_forward_hook(lambda module, args, out: 3 * out)
    torch.testing.assert_close(nng.EmpiricalFIM(model, [(x, y)], nng.PMatDense, loss=hooked).to_dense(), found)


def test_losses_of_other_arguments_are_refused():
    model, x = problem(6)
    for loss in (nn.GaussianNLLLoss(), nn.TripletMarginLoss(), lambda f: f.sum(1)):
        with pytest.raises(nng.ArgumentTypeError, match="cannot be called with"):
            nng.EmpiricalFIM(model, [(x, x)], nng.PMatDiag, loss=loss)


def test_losses_mapped_over_examples():
    model, x = problem(6)
    y = torch.arange(6) % 4
    mapped = lambda f, y: torch.vmap(F.cross_entropy)(f, y)
    for measure in (nng.EmpiricalFIM, nng.GGN, nng.Hessian):
        found = measure(model, [(x, y)], nng.PMatDense, loss=mapped).to_dense()
        torch.testing.assert_close(found, measure(model, [(x, y)], nng.PMatDense, loss="cross_entropy").to_dense())
