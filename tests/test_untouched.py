"""Models that draw random numbers or change their buffers are refused, and left as they were."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.capture.overwritten import Overwritten

f64 = torch.float64


class Net(nn.Module):
    """Two layers, and between them what ``act`` does to the hidden units."""

    def __init__(self, act):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 5, dtype=f64), nn.Linear(5, 3, dtype=f64), act
        self.register_buffer("moving", torch.zeros(5, dtype=f64))
        self.register_buffer("count", torch.tensor(0))
        self.own = torch.Generator().manual_seed(3)

    def forward(self, x):
        return self.second(self.act(self, self.first(x)).tanh())


def dropped(net, h):
    return h * torch.empty(len(h), 1, dtype=f64).bernoulli_(0.9) / 0.9


def counted(net, h):
    net.count += 1
    return h


def replaced(net, h):
    net.count = net.count + 1
    return h


def averaged(net, h):
    net.moving.mul_(0.9).add_(0.1 * h.detach().mean(0))
    return h - net.moving


def averaged_out_of_sight(net, h):
    net.moving.data.copy_(h.detach().mean(0))
    return h - net.moving


RANDOM = {
    "bernoulli": dropped,
    "gumbel": lambda net, h: F.gumbel_softmax(h),
    "randn_like": lambda net, h: h + 0.1 * torch.randn_like(h),
    "normal_": lambda net, h: h + torch.empty_like(h).normal_(),
    "multinomial": lambda net, h: h * torch.multinomial(h.detach().softmax(1), 5, replacement=True),
    "own generator": lambda net, h: h + torch.rand(h.shape, generator=net.own, dtype=f64),
    "randperm of features": lambda net, h: h[:, torch.randperm(5)],
    "distributions": lambda net, h: torch.distributions.Normal(h, 0.1).rsample(),
    "rand": lambda net, h: h * torch.rand(1, dtype=f64),
    "numpy": lambda net, h: h + float(np.random.rand()),
    "python": lambda net, h: h * random.random(),
    "a choice": lambda net, h: h.tanh() if random.random() < 0.5 else h,
}
STATEFUL = {
    "counter": counted,
    "counter replaced": replaced,
    "moving average": averaged,
    "by .data": averaged_out_of_sight,
}
MEASURES = {
    "FIM": lambda m, x: nng.FIM(m, [x], nng.PMatDiag),
    "implicit": lambda m, x: nng.FIM(m, [x], nng.PMatImplicit),
    "kernel": lambda m, x: nng.GramMatrix(m, [x]),
    "Jacobian": lambda m, x: nng.Jacobian(m, [x]),
    "Hessian": lambda m, x: nng.Hessian(m, (x, torch.zeros(len(x), dtype=torch.long)), loss="cross_entropy"),
}


def states(model):
    numbers = np.random.get_state()
    return [
        *model.state_dict().values(),
        torch.get_rng_state(),
        model.own.get_state(),
        torch.tensor(numbers[1].astype(np.int64)),
        torch.tensor(numbers[2]),
    ]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", [*RANDOM, *STATEFUL])
def test_refused_and_left_as_it_was(name, measure):
    model, x = Net((RANDOM | STATEFUL)[name]).eval(), torch.randn(6, 4, dtype=f64)
    before, python, buffers = [t.clone() for t in states(model)], random.getstate(), list(model.buffers())
    with pytest.raises(nng.ModeError, match=r"random|buffers"):
        MEASURES[measure](model, x)
    assert all(torch.equal(a, b) for a, b in zip(before, states(model)))
    assert random.getstate() == python
    assert all(a is b for a, b in zip(buffers, model.buffers()))


def test_numbers_that_are_drawn_and_not_used_are_let_pass():
    def idle(net, h):
        torch.rand([])
        return h

    model, plain, x = Net(idle), Net(lambda net, h: h), torch.randn(6, 4, dtype=f64)
    plain.load_state_dict(model.state_dict())
    before = torch.get_rng_state()
    for representation in (nng.PMatDense, nng.PMatDiag):
        torch.testing.assert_close(
            nng.FIM(model, [x, x[:3]], representation).to_dense(), nng.FIM(plain, [x, x[:3]], representation).to_dense()
        )
    assert torch.equal(torch.get_rng_state(), before)


def test_the_state_is_put_back_when_the_model_raises():
    def raises(net, h):
        net.count += 1
        torch.rand(3)
        raise ValueError("the user's own")

    model, x = Net(raises), torch.randn(3, 4, dtype=f64)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="own"):
        nng.FIM(model, [x], nng.PMatDiag)
    assert int(model.count) == 0 and torch.equal(torch.get_rng_state(), before)


def test_spectral_normalisation_in_training_mode_is_refused_and_put_back():
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5, dtype=f64)), nn.Tanh(), nn.Linear(5, 3, dtype=f64)
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(nng.ModeError, match="buffers"):
        nng.FIM(model.train(), [torch.randn(6, 4, dtype=f64)], nng.PMatDiag)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    nng.FIM(model.eval(), [torch.randn(6, 4, dtype=f64)], nng.PMatDiag)


def test_batch_normalisation_refused_in_training_mode_counted_nothing():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).train()
    with pytest.raises(nng.ModeError):
        nng.FIM(model, [torch.randn(6, 4)], nng.PMatDiag)
    assert int(model[1].num_batches_tracked) == 0


def test_draws_of_labels_go_on():
    """What the library draws itself is new every time."""
    model, x = Net(lambda net, h: h), torch.randn(6, 4, dtype=f64)
    one, other = (nng.FIM_MonteCarlo(model, [x], nng.PMatDiag).diag().flat() for _ in range(2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("now", [torch.zeros(9), torch.full((), torch.nan).expand(9)], ids=["elsewhere", "in parts"])
def test_memory_that_a_parameter_had_before_is_none_of_its_own(now):
    """What is written there later is no parameter, which has moved since calls were first watched."""
    p = nn.Parameter(torch.ones(9))
    before, watched = p.data, Overwritten({"p": p})
    watched.keep(torch.Tensor.add_, (torch.zeros(9), 1.0), {})
    p.data = now
    watched.keep(torch.Tensor.add_, (before, 1.0), {})
    before.add_(1.0)
    assert watched.put_back() == [] and p.data_ptr() == now.data_ptr()
    watched.keep(torch.Tensor.add_, (p.data, 1.0), {})
    assert watched.put_back() == []
