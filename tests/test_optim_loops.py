"""Optimizers in training loops: accumulation, scalers, schedulers, closures, resumption, steps that are left out."""

import contextlib
import copy
import io
import itertools

import pytest
import torch
from cases import build
from optimizing import EXACT, MAKERS, PRESETS, close, one_step
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, SkippedStepWarning


@pytest.mark.parametrize("blocks", ["one", "several"])
@pytest.mark.parametrize("preset", PRESETS)
def test_accumulation_equals_one_big_batch(preset, blocks):
    case = build("conv2d", sizes=(2, 5, 3))
    whole, parts = PRESETS[preset][2](copy.deepcopy(case.model)), PRESETS[preset][2](case.model)
    _, expected = one_step(whole, case.inputs, case.targets)
    before = nng.PVector.from_model(case.model)

    def passes(batches):
        for x, y in batches:
            (F.cross_entropy(case.model(x), y) * len(x) / case.n).backward()

    if blocks == "one":
        with parts.observe():
            passes(case.loader)
    else:
        for batch in case.loader:
            with parts.observe():
                passes([batch])
    parts.step()
    assert close(before - nng.PVector.from_model(case.model), expected, 1e-10)


@pytest.mark.parametrize("scalings", ["batch", "running"])
def test_grad_scaler(scalings):
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    results = []
    for scaled in (None, "step", "unscale", "overflow"):
        model = copy.deepcopy(case.model)
        opt = EKFAC(model, lr=0.1, scalings=scalings, basis_every=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled is not None)
        for turn in range(4):
            if scaled == "overflow" and turn == 1:  # found by the scaler, which backs off: no trace is left
                with opt.observe():
                    scaler.scale(
                        F.cross_entropy(model(x * float("inf")).nan_to_num(1e3) * model(x).sum(), y)
                    ).backward()
                with pytest.warns(SkippedStepWarning, match="GradScaler"):
                    scaler.step(opt)
                scaler.update()
                opt.zero_grad()
            with opt.observe(scaler=scaler if scaled == "unscale" else None):
                scaler.scale(F.cross_entropy(model(x), y)).backward()
            if scaled == "unscale":
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        results.append(nng.PVector.from_model(model))
    assert all(close(r, results[0], 1e-10) for r in results)
    with opt.observe():
        scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.unscale_(opt)
    with pytest.raises(nng.ArgumentError, match="observe\\(scaler=scaler\\)"):
        scaler.step(opt)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer", "gru", "bare"])
@pytest.mark.parametrize("kind", MAKERS)
def test_resuming_is_bitwise(kind, name):
    case = build(name, sizes=(4, 6))
    opt = MAKERS[kind](case.model)
    before = {n: p.clone() for n, p in case.model.named_parameters()}

    def train(opt, turns):
        for turn in turns:
            one_step(opt, *case.loader[turn % 2])

    train(opt, range(4))
    assert all(
        not torch.equal(before[n], p) for n, p in case.model.named_parameters() if p.grad is not None and p.grad.any()
    )
    file = io.BytesIO()
    torch.save([opt.state_dict(), case.model.state_dict()], file)
    train(opt, range(4, 9))
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    again = build(name, sizes=(4, 6)).model
    again.load_state_dict(weights)
    second = MAKERS[kind](again)
    second.load_state_dict(saved)
    train(second, range(4, 9))
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), again.parameters()))


def test_schedulers_drive_the_rate():
    case = build("mlp", sizes=(6,))
    opt = KFAC(case.model, lr=1.0, momentum=0.0, kl_clip=None)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    rates = []
    for _ in range(3):
        g, step = one_step(opt, *case.loader[0])
        rates.append(opt.param_groups[0]["lr"])
        scheduler.step()
    assert rates == [1.0, 0.5, 0.25]


def test_closure():
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    other = copy.deepcopy(case.model)
    opt, plain = KFAC(case.model), KFAC(other)
    one_step(plain, x, y)

    def closure():
        opt.zero_grad()
        with opt.observe():
            loss = F.cross_entropy(case.model(x), y)
            loss.backward()
        return loss

    assert float(opt.step(closure).detach()) > 0
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), other.parameters()))


def test_precondition_for_another_optimizer():
    case = build("conv1d", sizes=(5,))
    x, y = case.loader[0]
    other = copy.deepcopy(case.model)
    opt, plain = EKFAC(case.model, lr=0.1), EKFAC(other, lr=0.1)
    sgd = torch.optim.SGD(case.model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        one_step(plain, x, y)
        sgd.zero_grad()
        with opt.observe():
            F.cross_entropy(case.model(x), y).backward()
        assert opt.precondition_()
        sgd.step()
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(case.model.parameters(), other.parameters()))


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "ekfac-ra", "monte-carlo"])
def test_steps_that_are_not_finite_leave_no_trace(kind):
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    other = copy.deepcopy(case.model)
    opt, clean = MAKERS[kind](case.model), MAKERS[kind](other)
    for turn in range(4):
        if turn == 2:
            for first in (True, False):
                before = copy.deepcopy(case.model.state_dict())
                with pytest.warns(SkippedStepWarning, match="'0.weight'") if first else contextlib.nullcontext():
                    one_step(opt, x * float("nan"), y)
                assert all(torch.equal(before[k], v) for k, v in case.model.state_dict().items())
            opt.observer.drawn = clean.observer.drawn
        one_step(opt, x, y)
        one_step(clean, x, y)
    assert opt.skipped == 2
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), other.parameters()))


def test_squares_that_overflow_do_not_stay_in_the_spectrum():
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    opt = EKFAC(case.model)
    for turn in range(3):
        opt.zero_grad()
        with opt.observe():
            (F.cross_entropy(case.model(x), y) * (1e170 if turn == 1 else 1)).backward()
        with pytest.warns(SkippedStepWarning, match="overflows") if turn == 1 else contextlib.nullcontext():
            opt.step()
    assert opt.clock.steps == 2 and all(torch.isfinite(b.d).all() for b in opt.partition.parts[0].blocks.values())


def test_nothing_is_left_on_the_model():
    case = build("transformer", sizes=(4,))
    before = {
        n: (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in case.model.named_modules()
    }
    opt = EKFAC(case.model)
    one_step(opt, *case.loader[0])
    with pytest.raises(ZeroDivisionError), opt.observe():
        case.model(case.inputs).sum().backward()
        raise ZeroDivisionError
    with pytest.raises(AssertionError), opt.observe():
        case.model(case.inputs[:, :, :2])
    assert before == {
        n: (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in case.model.named_modules()
    }
    assert not any(p._backward_hooks for p in case.model.parameters())
    one_step(opt, *case.loader[0])


def test_blocks_that_end_in_another_order_leave_nothing():
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    before = set(vars(case.model))
    opts = [EKFAC(case.model), KFAC(case.model), KFAC(case.model, fisher="monte_carlo", likelihood="categorical")]
    for order in itertools.permutations(range(3)):
        blocks = [opt.observe() for opt in opts]
        for block in blocks:
            block.__enter__()
        F.cross_entropy(case.model(x), y).backward()
        for j in order:
            blocks[j].__exit__(None, None, None)
            assert set(vars(copy.deepcopy(case.model))) == before
        assert set(vars(case.model)) == before
        assert [opt.pending.examples for opt in opts] == [6, 6, 6]
        for opt in opts:
            opt.zero_grad()


@pytest.mark.parametrize("kind", [KFAC, type("Mine", (KFAC,), {"step": lambda self, *args: KFAC.step(self, *args)})])
def test_steps_have_hooks_and_a_name_for_profilers(kind):
    case = build("mlp", sizes=(6,))
    opt, calls = kind(case.model), []
    handles = [
        opt.register_step_pre_hook(lambda opt, args, kwargs: calls.append("before")),
        opt.register_step_post_hook(lambda opt, args, kwargs: calls.append("after")),
    ]
    one_step(opt, *case.loader[0])
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    everyone = register_optimizer_step_post_hook(lambda *args: calls.append("after any"))
    one_step(opt, *case.loader[0])
    everyone.remove()
    one_step(opt, *case.loader[0])
    assert calls == ["before", "after", "after any"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        one_step(opt, *case.loader[0])
    assert [e.count for e in seen.key_averages() if e.key == f"Optimizer.step#{kind.__name__}.step"] == [1]


def test_training_mode_and_penalties_on_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)).train()
    opt, x = EKFAC(model, lr=0.05), torch.randn(64, 4)
    y, before, losses = x[:, :3].argmax(1), [p.clone() for p in model.parameters()], []
    for _ in range(40):
        opt.zero_grad()
        with opt.observe():
            loss = F.cross_entropy(model(x), y) + 1e-3 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert {"1.weight", "1.bias"} == opt.observer.batchwise  # they stand beside statistics of the batch: rest
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters()))


def test_autocast():
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        torch.randn(16, 6),
        torch.randint(0, 3, (16,)),
    )
    steps = []
    for enabled in (False, True):
        opt = KFAC(copy.deepcopy(model), **EXACT)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            steps.append(one_step(opt, x, y)[1])
    assert steps[1].dtype == torch.float32 and close(steps[1], steps[0], 0.1)


def test_bases_in_the_background():
    case = build("mlp", sizes=(6,))
    opt = EKFAC(case.model, lr=0.01, basis_every=2, async_basis=True, statistics_decay=0.0)
    one_step(opt, *case.loader[0])
    first = [block.ug for block in opt.partition.parts[0].blocks.values()]
    for _ in range(2):
        one_step(opt, *case.loader[0])
    opt.partition.parts[0].future.result()
    one_step(opt, *case.loader[0])
    assert all(not torch.equal(u, block.ug) for u, block in zip(first, opt.partition.parts[0].blocks.values()))
