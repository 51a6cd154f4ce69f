"""Optimizers of a model whose parameters were exchanged or frozen since: said, never trained in part."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng


def exchanged(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def another_module(model):
    model[0] = nn.Linear(3, 4).double()


def wrapped(model):
    model[0] = nn.Sequential(nn.Linear(3, 4).double())


def reparametrised(model):
    nn.utils.parametrizations.weight_norm(model[0])


def frozen(model):
    model[0].weight.requires_grad_(False)


KINDS = (nng.optim.KFAC, nng.optim.EKFAC, nng.optim.NaturalGradient)
CHANGES = (exchanged, another_module, wrapped, reparametrised, frozen)


@pytest.mark.parametrize("automatic", [False, True], ids=["observe", "automatic"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_are_no_longer_the_models(change, kind, automatic):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3
    opt = kind(model, lr=0.1, damping=0.5, automatic=automatic)

    def step():
        opt.zero_grad()
        if automatic:
            F.cross_entropy(model(x), y).backward()
        else:
            with opt.observe():
                F.cross_entropy(model(x), y).backward()
        opt.step()

    step()
    change(model)
    before = [p.detach().clone() for p in model.parameters()]
    what = "frozen" if change is frozen else "other"
    with pytest.raises(nng.CollectionError, match=rf"{what} parameters \['0.weight'.*build it again"):
        step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize("kind", [*KINDS, nng.optim.SOAP, nng.optim.WinsorizedSGD])
def test_a_model_that_was_converted_since(kind):
    """Is said; a new optimizer takes up the state in the new dtype, up to rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.arange(30) % 3
    opt = kind(model, lr=0.01)

    def step(opt, model):
        opt.zero_grad()
        with opt.observe():
            F.cross_entropy(model(x.to(model[0].weight.dtype)), y).backward()
        opt.step()

    for _ in range(3):
        step(opt, model)
    other = copy.deepcopy(model).float()
    again = kind(other, lr=0.01)
    again.load_state_dict(opt.state_dict())
    for _ in range(3):
        step(opt, model)
        step(again, other)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    off = 0.05 if kind is nng.optim.SOAP else 1e-4  # its eigenvectors without any gradient yet are rounding's
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(q.double(), p.detach(), rtol=0, atol=off)
    model.float()
    with pytest.raises(nng.CollectionError, match=r"torch.float32 on cpu now, and were torch.float64.*build it again"):
        step(opt, model)


@pytest.mark.parametrize("kind", KINDS)
def test_new_values_and_new_layers_are_no_exchange(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3
    opt = kind(model, lr=0.1, damping=0.5)
    for change in (lambda: None, lambda: model[0].weight.data.mul_(2), lambda: model.append(nn.Linear(3, 3).double())):
        change()
        before = model[0].weight.detach().clone()
        opt.zero_grad()
        with opt.observe():
            F.cross_entropy(model(x), y).backward()
        opt.step()
        assert not torch.equal(before, model[0].weight)
