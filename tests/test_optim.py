"""Natural-gradient optimizers: the step is the solve, whatever the training loop around it looks like."""

import contextlib
import copy
import io
import warnings

import pytest
import torch
from cases import build
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, LevenbergMarquardt, NaturalGradient, SkippedStepWarning
from nngeom.optim.packed import Packed

EXACT = dict(lr=1.0, momentum=0.0)
PRESETS = {
    "ekfac": (
        nng.PMatEKFAC,
        1e-2,
        lambda m, **k: EKFAC(m, damping=1e-2, basis_every=1, scalings="batch", **EXACT, **k),
    ),
    "ekfac-additive": (
        nng.PMatEKFAC,
        nng.FactoredTikhonov(1e-3),
        lambda m, **k: EKFAC(m, basis_every=1, scalings="batch", **EXACT, **k),
    ),
    "kfac": (nng.PMatKFAC, 1e-2, lambda m, **k: KFAC(m, damping=1e-2, inverse_every=1, **EXACT, **k)),
    "kfac-factored": (
        nng.PMatKFAC,
        nng.FactoredTikhonov(1e-2, balanced=False),
        lambda m, **k: KFAC(m, inverse_every=1, **EXACT, **k),
    ),
    "kfac-balanced": (
        nng.PMatKFAC,
        nng.FactoredTikhonov(1e-3),
        lambda m, **k: KFAC(m, damping=nng.FactoredTikhonov(1e-3), inverse_every=1, **EXACT, **k),
    ),
    "kfac-reduce": (
        nng.PMatKFAC.options(sharing="reduce"),
        1e-2,
        lambda m, **k: KFAC(m, damping=1e-2, sharing="reduce", inverse_every=1, **EXACT, **k),
    ),
    "ekfac-sua": (
        nng.PMatEKFAC.options(sua=True),
        1e-2,
        lambda m, **k: EKFAC(m, damping=1e-2, sua=True, basis_every=1, scalings="batch", **EXACT, **k),
    ),
    "kfac-sua": (
        nng.PMatKFAC.options(sua=True),
        1e-2,
        lambda m, **k: KFAC(m, damping=1e-2, sua=True, inverse_every=1, **EXACT, **k),
    ),
    "diag": (nng.PMatDiag, 1e-2, lambda m, **k: NaturalGradient(m, nng.PMatDiag, damping=1e-2, **EXACT, **k)),
    "block-diag": (
        nng.PMatBlockDiag,
        1e-2,
        lambda m, **k: NaturalGradient(m, nng.PMatBlockDiag, damping=1e-2, **EXACT, **k),
    ),
    "dense": (nng.PMatDense, 1e-2, lambda m, **k: NaturalGradient(m, nng.PMatDense, damping=1e-2, **EXACT, **k)),
}
MODELS = [
    "mlp",
    "inplace",
    "conv1d",
    "conv2d",
    "sequence",
    "attention",
    "transformer",
    "language-model",
    "tied",
    "reused",
    "batch-norm",
    "time-first",
]


def gradient(opt):
    """``.grad`` as a vector."""
    parameters = opt.collection.parameters(opt.observer.task.model)
    return nng.PVector.from_dict(
        opt.collection, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    )


def one_step(opt, x, y, reduction="mean"):
    """Observe and step; the gradient, and what was subtracted from the parameters."""
    model = opt.observer.task.model
    opt.zero_grad()
    with opt.observe(reduction):
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    g, before = gradient(opt), nng.PVector.from_model(model)
    opt.step()
    return g, before - nng.PVector.from_model(model)


def close(x, y, tolerance=1e-6):
    return float((x - y).norm()) <= tolerance * float(y.norm()) and float(y.norm()) > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_step_is_solve(name, preset):
    case = build(name, sizes=(5,))
    representation, damping, make = PRESETS[preset]
    opt = make(case.model, statistics_decay=0.0)
    for reduction in ("mean", "sum"):
        x, y = case.loader[0]
        fisher = nng.EmpiricalFIM(case.model, (x, y), representation, loss="cross_entropy")
        g, step = one_step(opt, x, y, reduction)
        assert close(step, fisher.solve(g, damping))
        with torch.no_grad():  # a second step, elsewhere
            for p in case.model.parameters():
                p.mul_(0.9)
    assert not opt.observer.batchwise


@pytest.mark.parametrize("name", ["mlp", "conv2d", "attention"])
def test_exact_fisher(name):
    case = build(name, sizes=(5,))
    x, y = case.loader[0]
    opt = KFAC(case.model, damping=1e-2, fisher="exact", likelihood="categorical", **EXACT)
    fisher = nng.FIM(case.model, (x, y), nng.PMatKFAC)
    g, step = one_step(opt, x, y)
    assert close(step, fisher.solve(g, 1e-2))


def test_monte_carlo_fisher_is_unbiased_and_keyed():
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    opt = NaturalGradient(
        case.model,
        nng.PMatDense,
        lr=0.0,
        momentum=0.0,
        statistics_decay=0.999,
        fisher="monte_carlo",
        likelihood="categorical",
        damping=1e-2,
    )
    exact = nng.FIM(case.model, (x, y), nng.PMatDense).to_dense()
    for _ in range(250):
        one_step(opt, x, y)
    mean = next(iter(opt.partition.parts[0].averages.read().values()))["m"]
    assert float((mean - exact).norm() / exact.norm()) < 0.15
    assert opt.observer.drawn == 250 * 6  # every draw has a key of its own


def test_linear_regression_lands_on_least_squares():
    torch.manual_seed(0)
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    model = nn.Linear(4, 2).double()
    for representation in (nng.PMatKFAC, nng.PMatDense):
        nn.init.normal_(model.weight)
        opt = NaturalGradient(
            model, representation, lr=1.0, momentum=0.0, damping=1e-12, fisher="exact", likelihood="gaussian"
        )
        with opt.observe():
            (0.5 * (model(x) - y).square().sum(1).mean()).backward()
        opt.step()
        opt.zero_grad()
        best = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1), y).solution
        assert torch.allclose(torch.cat([model.weight, model.bias[:, None]], 1).T, best, atol=1e-8)


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


MAKERS = {
    "kfac": lambda m: KFAC(m, lr=0.05, inverse_every=3, statistics_every=2),
    "kfac-exact": lambda m: KFAC(m, lr=0.05, damping=0.1, weight_decay=0.01, kl_clip=1e-3),
    "ekfac-ra": lambda m: EKFAC(m, lr=0.05, basis_every=3),
    "ekfac": lambda m: EKFAC(m, lr=lambda t: 0.1 / (1 + t), basis_every=3, scalings="batch", statistics_decay=0.5),
    "ekfac-sua": lambda m: EKFAC(m, lr=0.05, basis_every=3, sua=True, scalings="batch"),
    "monte-carlo": lambda m: EKFAC(m, lr=0.05, basis_every=3, fisher="monte_carlo", likelihood="categorical"),
    "mixed": lambda m: NaturalGradient(
        m, nng.PMatMixed({"*bias*": nng.PMatDiag}, default=nng.PMatEKFAC), lr=0.05, every=2
    ),
    "quasi-diag": lambda m: NaturalGradient(m, nng.PMatQuasiDiag, lr=0.01, damping=0.1),
}


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


def test_running_scalings_follow_the_formula():
    case = build("mlp", sizes=(7,))
    x, y = case.loader[0]
    opt = EKFAC(case.model, lr=0.1, momentum=0.0, basis_every=3, scalings_decay=0.6, statistics_decay=0.0)
    expected, bases = {}, {}
    for turn in range(5):
        if turn % 3 == 0:  # a new basis: the spectrum starts from KFAC's
            kfac = nng.EmpiricalFIM(case.model, (x, y), nng.PMatKFAC, loss="cross_entropy")
            bases = {layout: block.eigen() for layout, block in kfac.blocks.items()}
            expected = {layout: block.d for layout, block in bases.items()}
        g, step = one_step(opt, x, y)
        for layout, block in bases.items():
            v = block.basis.tmv(layout.gather(g.flat()))
            expected[layout] = 0.6 * expected[layout] + 0.4 * 7 * v**2
            assert torch.allclose(opt.partition.parts[0].blocks[layout].d, expected[layout], rtol=1e-9, atol=1e-15)
            damped = expected[layout] + block.additive(1e-3)
            assert torch.allclose(layout.gather(step.flat()), 0.1 * block.basis.mv(v / damped), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("sua", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "conv2d",
        "depthwise",
        "deconv2d",
        "deconv3d",
        "language-model",
        "transformer",
        "tied",
        "experts",
        "einsum",
    ],
)
def test_packed_blocks_are_gathered_and_scattered_by_their_layouts(name, sua):
    case = build(name, sizes=(5,))
    layouts = list(nng.FIM(case.model, case.loader, nng.PMatKFAC.options(sua=sua)).blocks)
    vector = torch.randn(nng.LayerCollection.from_model(case.model).numel)
    before, expected = vector.clone(), vector.clone()
    packed = Packed(layouts, vector)
    packed.read()
    for layout, block in zip(layouts, packed.blocks):
        assert torch.equal(block, layout.gather(before))
        block.mul_(torch.arange(block.numel()).view(block.shape))
        layout.scatter_(expected, block)
    assert torch.equal(vector, before)
    packed.write()
    assert torch.equal(vector, expected)


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


def test_schedulers_drive_the_rate():
    case = build("mlp", sizes=(6,))
    opt = KFAC(case.model, lr=1.0, momentum=0.0)
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


def test_kl_clip_bounds_the_predicted_divergence():
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    damped = nng.EmpiricalFIM(case.model, (x, y), nng.PMatDense, loss="cross_entropy").to_dense() + 0.1 * torch.eye(
        43, dtype=torch.float64
    )
    opt = NaturalGradient(case.model, nng.PMatDense, lr=0.7, momentum=0.0, damping=0.1, kl_clip=1e-4)
    _, step = one_step(opt, x, y)
    assert float(0.5 * step.flat() @ damped @ step.flat()) == pytest.approx(1e-4, rel=1e-9)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "ekfac-ra", "monte-carlo"])
def test_steps_that_are_not_finite_leave_no_trace(kind):
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    other = copy.deepcopy(case.model)
    opt, clean = MAKERS[kind](case.model), MAKERS[kind](other)
    for turn in range(4):
        if turn == 2:
            for count in (1, 2):
                before = copy.deepcopy(case.model.state_dict())
                with pytest.warns(SkippedStepWarning, match=f"{count} so far"):
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


def test_batchwise_parameters_get_n_times_the_squared_gradient():
    case = build("gru", sizes=(5,))
    opt = KFAC(case.model, damping=1e-2, **EXACT)
    g, step = one_step(opt, *case.loader[0])
    assert all(name.startswith("cell") for name in opt.observer.batchwise) and len(opt.observer.batchwise) == 4
    for name in opt.observer.batchwise:
        assert torch.allclose(step[name], g[name] / (5 * g[name].square() + 1e-2), rtol=1e-9)


def test_rest_takes_what_is_above_the_limit():
    case = build("language-model", sizes=(5,))
    opt = NaturalGradient(case.model, nng.PMatKFAC.options(block_limit=10), damping=1e-2, **EXACT)
    mixed = nng.PMatMixed({"position": nng.PMatDiag}, default=nng.PMatKFAC)
    fisher = nng.EmpiricalFIM(case.model, case.loader, mixed, loss="cross_entropy")
    g, step = one_step(opt, *case.loader[0])
    assert close(step, fisher.solve(g, 1e-2))


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
        rule.update = lambda change, predicted: setattr(rule, "told", (change, predicted))
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


def test_sparse_embeddings_take_the_steps_of_dense_ones():
    """The weights after three observed steps, whether gradients of the table are sparse or not."""

    def trained(sparse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
        optimizer = nng.optim.EKFAC(model, lr=0.1)
        x, y = torch.randint(0, 7, (5, 3), generator=torch.Generator().manual_seed(1)), torch.arange(5) % 3
        for _ in range(3):
            with optimizer.observe():
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return nng.PVector.from_model(model).flat()

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-12, atol=1e-14)
