"""Groups of parameters, some of them left to AdamW inside the same optimizer; and why steps are not taken."""

import contextlib
import copy
import io
import warnings

import pytest
import torch
from cases import build
from optimizing import close
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, NaturalGradient, SkippedStepWarning

SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.1}


class Reader(nn.Module):
    """Tokens, a norm and two linear maps."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.norm(self.table(x)))).mean(1))


def problem():
    torch.manual_seed(0)
    model = Reader().double()
    batches = [(torch.randint(0, 9, (6, 5)), torch.randint(0, 3, (6,))) for _ in range(3)]
    return model, batches


def inside(model):
    return nng.LayerCollection.from_model(model, exclude=[nn.Embedding, nn.LayerNorm])


def step(opt, model, x, y):
    opt.zero_grad()
    with opt.observe():
        F.cross_entropy(model(x), y).backward()
    opt.step()


@pytest.mark.parametrize("kind", [KFAC, EKFAC, lambda m, **k: NaturalGradient(m, nng.PMatDense, damping=0.1, **k)])
def test_two_optimizers_in_one(kind):
    """Natural gradient and AdamW at once: each on its own parameters, as by two optimizers, bit by bit."""
    model, batches = problem()
    other = copy.deepcopy(model)
    both = kind(model, layer_collection=inside(model), fallback=SETTINGS)
    own = kind(other, layer_collection=inside(other))
    rest = [*other.table.parameters(), *other.norm.parameters()]
    adamw = torch.optim.AdamW(rest, **SETTINGS)
    for x, y in batches * 2:
        step(both, model, x, y)
        adamw.zero_grad()
        own.zero_grad()
        with own.observe():
            F.cross_entropy(other(x), y).backward()
        own.step()
        adamw.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_groups_and_a_schedule_for_each():
    model, batches = problem()
    other = copy.deepcopy(model)
    groups = [
        {"params": model.inner.parameters(), "lr": 0.05},
        {"params": model.head.parameters(), "lr": 0.02, "momentum": 0.5, "weight_decay": 0.01},
        {"params": model.table.parameters(), "fallback": True, "lr": 1e-2},
        {"params": list(model.norm.parameters()), "fallback": True, "lr": 2e-3, "weight_decay": 0.0},
    ]
    opt = KFAC(model, layer_collection=inside(model), params=groups)
    factors = [lambda t: 0.5**t, lambda t: 1.0, lambda t: 1 / (1 + t), lambda t: 2.0]
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, factors)
    adamw = torch.optim.AdamW(
        [{"params": other.table.parameters(), "lr": 1e-2}, {"params": other.norm.parameters(), "lr": 2e-3}]
    )
    adamw.param_groups[1]["weight_decay"] = 0.0
    second = torch.optim.lr_scheduler.LambdaLR(adamw, factors[2:])
    for turn, (x, y) in enumerate(batches):
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        adamw.zero_grad()
        F.cross_entropy(other(x), y).backward()
        step(opt, model, x, y)
        adamw.step()
        assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.05 * 0.5**turn, 0.02, 1e-2 / (1 + turn), 4e-3])
        assert torch.equal(model.table.weight, other.table.weight) and torch.equal(model.norm.bias, other.norm.bias)
        schedule.step()
        second.step()


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_resuming_is_bitwise(kind, automatic):
    def make(model):
        return kind(model, layer_collection=inside(model), fallback=SETTINGS, automatic=automatic, lr=0.05)

    def train(opt, schedule, model, turns):
        for turn in turns:
            x, y = batches[turn % 3]
            opt.zero_grad()
            with contextlib.nullcontext() if automatic else opt.observe():
                F.cross_entropy(model(x), y).backward()
            opt.step()
            schedule.step()

    model, batches = problem()
    opt = make(model)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    train(opt, schedule, model, range(4))
    file = io.BytesIO()
    torch.save([opt.state_dict(), schedule.state_dict(), model.state_dict()], file)
    train(opt, schedule, model, range(4, 9))
    file.seek(0)
    saved, saved_schedule, weights = torch.load(file, weights_only=True)
    again, _ = problem()
    again.load_state_dict(weights)
    other = make(again)
    other_schedule = torch.optim.lr_scheduler.StepLR(other, 2, 0.5)
    other.load_state_dict(saved)
    other_schedule.load_state_dict(saved_schedule)
    train(other, other_schedule, again, range(4, 9))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in other.param_groups]


def test_scalers_reach_the_fallback():
    steps = []
    for enabled in (False, True):
        model, batches = problem()
        opt = KFAC(model, layer_collection=inside(model), fallback=SETTINGS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, enabled=enabled)
        for x, y in batches:
            opt.zero_grad()
            with opt.observe():
                scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(opt)
            scaler.update()
        steps.append(nng.PVector.from_model(model))
    assert close(steps[1], steps[0], 1e-9)


def test_what_is_refused():
    model, _ = problem()
    with pytest.raises(nng.ArgumentError, match="there is none"):
        KFAC(model, fallback={"lr": 1e-3})
    with pytest.raises(TypeError, match="AdamW as a dict"):
        KFAC(model, layer_collection=inside(model), fallback=torch.optim.AdamW)
    with pytest.raises(nng.ArgumentError, match="refused by torch"):
        KFAC(model, layer_collection=inside(model), fallback={"momentum": 0.9})
    with pytest.raises(nng.ArgumentError, match="refused by torch"):
        KFAC(model, layer_collection=inside(model), fallback={"lr": -1.0})
    with pytest.raises(nng.ArgumentError, match="fallback=dict"):
        KFAC(model, layer_collection=inside(model), params=list(model.parameters()))
    with pytest.raises(nng.ArgumentError, match="inside the model's collection"):
        KFAC(model, params=[{"params": model.parameters(), "fallback": True}])
    with pytest.raises(TypeError, match=r"KFAC\(model\)"):
        KFAC(model.parameters())
    with pytest.raises(TypeError, match=r"KFAC\(model\)"):
        EKFAC(list(model.parameters()), automatic=True)


def skipped(opt, run):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            run()
    assert opt.skipped == 3 and opt.clock.steps == 0
    said = [w for w in said if w.category is SkippedStepWarning]
    assert len(said) == 1
    return str(said[0].message)


@pytest.mark.parametrize("kind", [KFAC, EKFAC, lambda m, **k: NaturalGradient(m, nng.PMatDiag, **k)])
def test_a_skipped_step_says_why_once(kind):
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    before = copy.deepcopy(case.model.state_dict())
    opt = kind(case.model)

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(case.model(x), y) * float("nan")
        loss.backward()
        return loss

    assert "the loss is nan" in skipped(opt, lambda: opt.step(closure))
    opt = kind(case.model)

    def broken_layer():
        opt.zero_grad()
        with opt.observe():
            F.cross_entropy(case.model(x), y).backward()
        case.model[2].bias.grad[1] = float("inf")
        opt.step()

    assert "the gradient of '2.bias' is not finite" in skipped(opt, broken_layer)
    opt = kind(case.model)

    def overflow():
        opt.zero_grad()
        with opt.observe():
            (F.cross_entropy(case.model(x), y) * 1e200).backward()
        for p in case.model.parameters():
            p.grad.mul_(1e-200)
        opt.step()

    assert "the squares of its examples' are not" in skipped(opt, overflow)
    opt, scaler = kind(case.model), torch.amp.GradScaler("cpu", init_scale=2.0)

    def scaled():
        opt.zero_grad()
        with opt.observe():
            scaler.scale(F.cross_entropy(case.model(x), y) * float("inf")).backward()
        scaler.step(opt)
        scaler.update()

    assert "GradScaler" in skipped(opt, scaled)
    assert all(torch.equal(before[k], v) for k, v in case.model.state_dict().items())


def test_a_broken_gradient_of_the_fallback_stops_all():
    model, batches = problem()
    opt = KFAC(model, layer_collection=inside(model), fallback=SETTINGS)
    before = copy.deepcopy(model.state_dict())
    with opt.observe():
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    model.norm.weight.grad[0] = float("nan")
    with pytest.warns(SkippedStepWarning, match=r"'norm\.weight'"):
        opt.step()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
