"""What a saved optimizer holds: files of older versions must stay readable."""

import copy

import pytest
import torch
from torch import nn

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, SOAP, LevenbergMarquardt, NaturalGradient

KEYS = {"steps", "skipped", "refreshed", "drawn", "reduction", "damping", "batchwise", "parts"}


def stepped(model, x, y, steps=1, **options):
    opt = KFAC(model, lr=0.1, damping=LevenbergMarquardt(every=1), **options)
    advance(opt, model, x, y, steps)
    return opt


def advance(opt, model, x, y, steps):
    loss = nn.CrossEntropyLoss()
    for _ in range(steps):
        opt.zero_grad()
        with opt.observe():
            loss(model(x), y).backward()
        opt.step(evaluate=lambda: loss(model(x), y))


def test_the_state_has_the_keys_that_it_always_had():
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    state = stepped(nn.Linear(4, 3), x, y).state_dict()
    assert state.keys() == {"state", "param_groups", "curvature"} and state["curvature"].keys() == KEYS
    assert EKFAC(nn.Linear(4, 3)).state_dict()["curvature"]["damping"] is None


def test_every_part_takes_up_its_own_numbers():
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    opt = stepped(model, x, y, 3, fisher="monte_carlo", likelihood="categorical")
    other.load_state_dict(model.state_dict())
    again = KFAC(other, lr=0.1, damping=LevenbergMarquardt(every=1), fisher="monte_carlo", likelihood="categorical")
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert again.clock.state() == opt.clock.state() and again.clock.damping.value != LevenbergMarquardt().value
    assert again.pending.state() == opt.pending.state() and again.observer.state() == opt.observer.state()
    assert again.observer.drawn == 20  # KFAC takes statistics of every tenth batch
    for each, net in ((opt, model), (again, other)):
        advance(each, net, x, y, 2)
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize("kind", [KFAC, EKFAC, SOAP])
def test_who_resumes_and_who_goes_on_share_nothing(kind):
    torch.manual_seed(0)
    x, y, loss = torch.randn(20, 4), torch.randint(3, (20,)), nn.CrossEntropyLoss()
    models = [nn.Linear(4, 3) for _ in range(2)]
    opts = [kind(model, automatic=True) for model in models]

    def advance(opt, model):
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step()

    advance(opts[0], models[0])
    models[1].load_state_dict(models[0].state_dict())
    opts[1].load_state_dict(opts[0].state_dict())
    for opt, model in zip(opts, models):
        for _ in range(3):
            advance(opt, model)
    assert torch.equal(models[0].weight, models[1].weight)


def _net(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def _some(model, rate=0.1):
    return {"params": [{"params": model[0].parameters(), "lr": rate}, {"params": model[2].parameters()}]}


KINDS = {
    "KFAC": lambda m: KFAC(m),
    "KFAC in groups": lambda m: KFAC(m, **_some(m)),
    "EKFAC of gradients": lambda m: EKFAC(m, factors="gradients"),
    "EKFAC": lambda m: EKFAC(m, scalings="batch"),
    "SOAP of rows": lambda m: SOAP(m, factors="rows"),
    "a diagonal": lambda m: NaturalGradient(m, nng.PMatDiag),
    "a dense matrix": lambda m: NaturalGradient(m, nng.PMatDense),
    "a part": lambda m: KFAC(m, layer_collection=nng.LayerCollection.from_model(m, include="0.*")),
}


def _seen(model, opt):
    with opt.observe():
        nn.functional.cross_entropy(model(torch.ones(6, 4)), torch.arange(6) % 3).backward()
    opt.step()
    return opt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", KINDS)
def test_a_state_of_another_kind_is_refused(kind, given):
    model, other = _net(), _net()
    state = _seen(model, KINDS[given](model)).state_dict()
    opt = KINDS[kind](other)
    if kind == given:
        opt.load_state_dict(state)
        return
    with pytest.raises(nng.ArgumentError, match=r"expected the|differ in"):
        opt.load_state_dict(state)
    if len(opt.param_groups) == 1 and kind != "a part":
        _seen(other, opt)  # as new


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_model_is_refused(kind):
    model, other = _net(), _net(5)
    state = _seen(model, KINDS[kind](model)).state_dict()
    with pytest.raises(nng.ArgumentError, match="another model"):
        KINDS[kind](other).load_state_dict(state)


@pytest.mark.parametrize("state", [None, 3, {}, {"curvature": {}}, {"curvature": {"parts": {}}}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(nng.ArgumentError, match="expected the"):
        KFAC(_net()).load_state_dict(state)
