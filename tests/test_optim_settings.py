"""Settings of optimizers: momentum, decay, groups, clipping, damping that follows the loss; and what is refused."""

import contextlib
import copy
import warnings

import pytest
import torch
from cases import build
from optimizing import one_step
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, LevenbergMarquardt, NaturalGradient


def test_momentum_decay_groups_and_callables():
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    reference = copy.deepcopy(case.model)
    weights, biases = ([p for p in case.model.parameters() if p.ndim == d] for d in (2, 1))
    opt = NaturalGradient(
        case.model,
        nng.PMatEye,
        lr=0.5,
        momentum=0.9,
        damping=lambda t: 1e8 * (t + 1),
        statistics_decay=0.0,
        params=[
            {"params": weights, "weight_decay": 0.01},
            {"params": biases, "lr": lambda t: 0.25 / (t + 1), "momentum": 0.0},
        ],
    )
    own, buffers = opt.param_groups[0], {}
    for turn in range(4):
        own["lr"] = 0.5 * 0.1 ** (turn // 2)
        F.cross_entropy(reference(x), y).backward()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                v = p.grad / (1e8 * (turn + 1))  # the damping drowns the matrix
                if p.ndim == 2:
                    v = buffers[name] = 0.9 * buffers.get(name, 0) + v
                    p.mul_(1 - own["lr"] * 0.01)
                p.sub_((own["lr"] if p.ndim == 2 else 0.25 / (turn + 1)) * v)
                p.grad = None
        one_step(opt, x, y)
    for p, q in zip(case.model.parameters(), reference.parameters()):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)


def test_kl_clip_bounds_the_predicted_divergence():
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    damped = nng.EmpiricalFIM(case.model, (x, y), nng.PMatDense, loss="cross_entropy").to_dense() + 0.1 * torch.eye(
        43, dtype=torch.float64
    )
    opt = NaturalGradient(case.model, nng.PMatDense, lr=0.7, momentum=0.0, damping=0.1, kl_clip=1e-4)
    _, step = one_step(opt, x, y)
    assert float(0.5 * step.flat() @ damped @ step.flat()) == pytest.approx(1e-4, rel=1e-9)


def test_levenberg_marquardt_follows_the_reduction_ratio():
    torch.manual_seed(0)
    x, y, model = (
        torch.randn(30, 4, dtype=torch.float64),
        torch.randn(30, 2, dtype=torch.float64),
        nn.Linear(4, 2).double(),
    )
    loss = lambda: 0.5 * (model(x) - y).square().sum(1).mean()
    value = lambda: float(loss().detach())
    rule = LevenbergMarquardt(initial=1.0, every=1, decay=0.5, factored=False)
    opt = NaturalGradient(
        model,
        nng.PMatDense,
        lr=0.5,
        momentum=0.5,
        damping=rule,
        fisher="exact",
        likelihood="gaussian",
        statistics_decay=0.0,
    )
    values = []
    for _ in range(6):
        before = value()
        old = rule.value
        with opt.observe():
            loss().backward()
        rule.update = lambda change, predicted: setattr(rule, "told", (change, predicted)) or 1.0
        opt.step(evaluate=loss)
        del rule.update
        opt.zero_grad()
        change, predicted = rule.told
        assert change == pytest.approx(value() - before, rel=1e-9)
        assert predicted >= change  # the true model of this loss, plus damping |step|**2 / 2
        rule.update(change, predicted)
        values.append(rule.value / old)
    assert values[0] == 0.5  # the loss is its own quadratic model: damping falls
    rule = LevenbergMarquardt(initial=1.0, every=1, decay=0.5)
    rule.update(1.0, -1.0)
    assert rule.value == 2.0
    with pytest.raises(nng.ArgumentError, match="evaluate"):
        with opt.observe():
            loss().backward()
        opt.step()


def test_what_is_refused():
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    opt = KFAC(case.model)
    with pytest.raises(nng.ArgumentError, match="before anything was observed"):
        opt.step()
    with pytest.raises(nng.ArgumentError, match="no backward pass"), opt.observe():
        case.model(x)
    with pytest.raises(nng.ArgumentError, match="was not called"), opt.observe():
        pass
    with pytest.raises(nng.ArgumentError, match="inside another"), opt.observe(), opt.observe():
        pass
    single = nn.Sequential(nn.Linear(4, 1), _Sum()).double()
    with pytest.raises(nng.OutputError, match="outputs="), KFAC(single).observe():
        single(x)
    for bad, kind in [
        ({"lr": -1.0}, nng.ArgumentError),
        ({"momentum": 1.0}, nng.ArgumentError),
        ({"damping": -1.0}, nng.DampingError),
        ({"lr": "fast"}, TypeError),
        ({"statistics_decay": 1.5}, nng.ArgumentError),
        ({"inverse_every": 0}, nng.ArgumentError),
        ({"fisher": "exact"}, nng.ArgumentError),
        ({"fisher": "true"}, nng.ArgumentError),
        ({"likelihood": "gaussian"}, nng.ArgumentError),
        ({"reduction": "none"}, nng.ArgumentError),
        ({"rest": "dense"}, nng.ArgumentError),
        ({"kl_clip": 0.0}, nng.ArgumentError),
        ({"params": [nn.Parameter(torch.zeros(2))]}, nng.ArgumentError),
        ({"params": [case.model[0].weight]}, nng.ArgumentError),
    ]:
        with pytest.raises(kind):
            KFAC(case.model, **bad)
    with pytest.raises(nng.ArgumentError, match="scalings"):
        EKFAC(case.model, scalings="exact")
    one_step(opt, x, y)
    with pytest.raises(nng.ArgumentError, match="other parameters"):
        KFAC(nn.Linear(3, 3)).load_state_dict(
            {**KFAC(nn.Linear(3, 3)).state_dict(), "curvature": opt.state_dict()["curvature"]}
        )
    with pytest.raises(nng.ArgumentError, match="no curvature"):
        opt.load_state_dict(torch.optim.SGD(case.model.parameters()).state_dict())


class _Sum(nn.Module):
    def forward(self, x):
        return x.sum()


def test_defaults_make_progress():
    torch.manual_seed(0)
    x = torch.randn(256, 10)
    y = (x[:, :3].square().sum(1) > 3).long()
    reached = {}
    for make in (KFAC, EKFAC, lambda m: torch.optim.Adam(m.parameters())):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2))
        opt = make(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(60):
                opt.zero_grad()
                with opt.observe() if isinstance(opt, NaturalGradient) else contextlib.nullcontext():
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                opt.step()
        reached[type(opt)] = float(loss.detach())
    assert reached[EKFAC] < 0.35
    assert reached[KFAC] < 0.8 * reached[torch.optim.Adam]
