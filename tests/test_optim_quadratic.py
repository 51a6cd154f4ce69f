"""Steps to the minimum of the exact quadratic model of a batch, against dense matrices."""

import copy

import pytest
import torch
from cases import build
from optimizing import close
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, LevenbergMarquardt, NaturalGradient

f64 = torch.float64
EXACT = dict(fisher="exact", likelihood="categorical", statistics_decay=0.0, lr=7.0, momentum=0.3, kl_clip=None)
MAKERS = {
    "kfac": (lambda m, **k: KFAC(m, damping=1e-2, inverse_every=1, statistics_every=1, **EXACT, **k), nng.PMatKFAC),
    "ekfac": (lambda m, **k: EKFAC(m, damping=1e-2, basis_every=1, scalings="batch", **EXACT, **k), nng.PMatEKFAC),
    "dense": (lambda m, **k: NaturalGradient(m, nng.PMatDense, damping=1e-2, **EXACT, **k), nng.PMatDense),
    "diagonal": (lambda m, **k: NaturalGradient(m, nng.PMatDiag, damping=1e-2, **EXACT, **k), nng.PMatDiag),
}


def passes(opt, model, x, y):
    opt.zero_grad()
    with opt.observe():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
    return loss


@pytest.mark.parametrize("name", ["mlp", "conv2d", "attention", "tied", "reused"])
@pytest.mark.parametrize("kind", MAKERS)
def test_steps_are_the_minimum_of_the_dense_model(kind, name):
    case = build(name)
    make, representation = MAKERS[kind]
    opt, last = make(case.model), None
    for j in range(3):
        x, y = case.loader[j % len(case.loader)]
        passes(opt, case.model, x, y)
        g = nng.PVector.from_grad(case.model)
        v = nng.FIM(case.model, [(x,)], representation).solve(g, 1e-2).flat()
        exact = nng.FIM(case.model, [(x,)], nng.PMatDense).to_dense()
        damped = exact + 1e-2 * torch.eye(len(exact), dtype=f64)
        span = torch.stack([v] if last is None else [v, last])
        c = torch.linalg.solve(span @ damped @ span.T, -span @ g.flat())
        before = nng.PVector.from_model(case.model)
        opt.step(outputs=lambda x=x: case.model(x))
        last = (nng.PVector.from_model(case.model) - before).flat()
        assert close(last, c @ span), j


def test_in_a_dense_matrix_the_step_is_that_of_newton():
    """Along ``(F + damping)^-1 g`` the model is lowest at the whole step; a least-squares problem is solved by one."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(20, 4, dtype=f64)
    y = torch.randn(20, 3, dtype=f64)
    options = dict(fisher="exact", likelihood="gaussian", statistics_decay=0.0, damping=1e-12, kl_clip=None)
    opt = NaturalGradient(model, nng.PMatDense, **options)
    with opt.observe():
        (0.5 * (model(x) - y).square().sum(1).mean()).backward()
    opt.step(outputs=lambda: model(x))
    loss = 0.5 * (model(x) - y).square().sum(1).mean()
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, list(model.parameters()))) < 1e-9


def test_a_part_of_the_batch_and_picked_outputs():
    case = build("mlp")
    x, y = case.loader[0]
    opt = MAKERS["kfac"][0](case.model, outputs=lambda returned: returned[0])
    wrapped = case.model.forward
    case.model.forward = lambda x: (wrapped(x), x)
    with opt.observe():
        F.cross_entropy(case.model(x)[0], y).backward()
    g, before = nng.PVector.from_grad(case.model), nng.PVector.from_model(case.model)
    del case.model.forward
    v = nng.FIM(case.model, [(x,)], nng.PMatKFAC).solve(g, 1e-2).flat()
    exact = nng.FIM(case.model, [(x[:2],)], nng.PMatDense).to_dense()
    expected = -(v @ g.flat()) / (v @ exact @ v + 1e-2 * v @ v) * v
    case.model.forward = lambda x: (wrapped(x), x)
    opt.step(outputs=lambda: case.model(x[:2]))
    assert close((nng.PVector.from_model(case.model) - before).flat(), expected)


def test_damping_follows_the_prediction():
    """Every step goes where the model is lowest; its damping falls where the model is right, and the loss falls."""
    case = build("mlp")
    rule = LevenbergMarquardt(initial=1.0, every=1, decay=0.5)
    opt = KFAC(case.model, damping=rule, fisher="exact", likelihood="categorical", inverse_every=1, kl_clip=None)
    x, y = case.loader[0]
    losses = []
    for _ in range(12):
        losses.append(float(passes(opt, case.model, x, y).detach()))
        evaluate = lambda: F.cross_entropy(case.model(x), y)
        opt.step(evaluate=evaluate, outputs=lambda: case.model(x))
    assert losses[-1] < 0.5 * losses[0] and rule.value < 1.0


@pytest.mark.parametrize("bound", [1e-3, 1e3])
def test_a_bound_makes_the_step_shorter(bound):
    steps, case = [], build("mlp")
    x, y = case.loader[0]
    exact = nng.FIM(case.model, [(x,)], nng.PMatDense)
    for kl_clip in (None, bound):
        model = copy.deepcopy(case.model)
        opt = KFAC(model, damping=1e-2, inverse_every=1, **{**EXACT, "kl_clip": kl_clip})
        passes(opt, model, x, y)
        opt.step(outputs=lambda model=model: model(x))
        steps.append(nng.PVector.from_model(model) - nng.PVector.from_model(case.model))
    divergences = [float(0.5 * (exact.vTMv(d) + 1e-2 * d.dot(d))) for d in steps]
    assert divergences[1] == pytest.approx(min(bound, divergences[0]))
    assert close(steps[1] / steps[1].norm(), steps[0] / steps[0].norm())


def test_a_model_that_is_wrong_says_so_once():
    """Of one example of forty the curvature is far too small: the loss rises, and a warning says it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).double()
    x, y = 3 * torch.randn(40, 20, dtype=f64), torch.randint(0, 5, (40,))
    rule = LevenbergMarquardt(initial=1e-6, every=1)
    opt = KFAC(model, damping=rule, fisher="exact", likelihood="categorical", inverse_every=1, kl_clip=None)
    with pytest.warns(nng.optim.QuadraticModelWarning, match="rose along 3 steps") as said:
        for _ in range(6):
            passes(opt, model, x, y)
            opt.step(outputs=lambda: model(x[:1]), evaluate=lambda: F.cross_entropy(model(x), y))
    assert len(said) == 1


def test_resuming_is_bitwise():
    case = build("mlp")
    (x, y), again = case.loader[0], copy.deepcopy(case.model)
    opts = [MAKERS["ekfac"][0](m) for m in (case.model, again)]

    def step(opt, model):
        passes(opt, model, x, y)
        opt.step(outputs=lambda: model(x))

    for _ in range(2):
        step(opts[0], case.model)
    again.load_state_dict(case.model.state_dict())
    opts[1].load_state_dict(opts[0].state_dict())
    for opt, model in zip(opts, (case.model, again)):
        step(opt, model)
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), again.parameters()))


@pytest.mark.parametrize("automatic", [False, True])
def test_with_a_closure_and_by_itself(automatic):
    case = build("mlp")
    x, y = case.loader[0]
    plain = copy.deepcopy(case.model)
    expected = MAKERS["kfac"][0](plain)
    passes(expected, plain, x, y)
    expected.step(outputs=lambda: plain(x))
    case.model.train()
    opt = MAKERS["kfac"][0](case.model, automatic=automatic)

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(case.model(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        opt.step(closure, outputs=lambda: case.model(x))
        if expected is not None:
            assert close(nng.PVector.from_model(case.model), nng.PVector.from_model(plain))
            expected = None


def test_what_is_refused():
    case = build("mlp")
    x, y = case.loader[0]
    cases = [
        (KFAC(case.model), "fisher='monte_carlo'"),
        (MAKERS["kfac"][0](case.model, weight_decay=0.1), "weight_decay=0"),
        (MAKERS["kfac"][0](case.model, reduction="sum"), "averaged over examples"),
        (KFAC(case.model, damping=nng.Cutoff(1e-3), fisher="exact", likelihood="categorical"), "a number"),
    ]
    for opt, message in cases:
        passes(opt, case.model, x, y)
        before = copy.deepcopy(case.model.state_dict())
        with pytest.raises(nng.ArgumentError, match=message):
            opt.step(outputs=lambda: case.model(x))
        assert all(torch.equal(before[n], p) for n, p in case.model.named_parameters())
