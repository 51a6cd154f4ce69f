"""Passes that no block wraps: observed once, as in a block, whatever else the loop does; nothing is kept of a graph."""

import copy
import gc
import io
import weakref

import pytest
import torch
from cases import build
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, NaturalGradient, WinsorizedSGD

NAMES = ["mlp", "conv2d", "transformer", "gru", "bare", "weight-norm"]
MORE = [*NAMES, "attention", "embedding", "tied", "conv1d", "language-model", "einsum", "experts", "shared-table"]
MORE += ["cross-attention", "rms-norm", "deconv2d", "bilinear"]
KINDS = {
    "kfac": lambda m, **k: KFAC(m, lr=0.05, inverse_every=2, statistics_every=2, reduction="mean", **k),
    "ekfac": lambda m, **k: EKFAC(m, lr=0.05, basis_every=2, scalings="batch", reduction="mean", **k),
    "ekfac-ra": lambda m, **k: EKFAC(m, lr=0.05, basis_every=3, statistics_every=2, reduction="mean", **k),
    "diag": lambda m, **k: NaturalGradient(m, nng.PMatDiag, lr=0.01, every=2, reduction="mean", **k),
    "monte-carlo": lambda m, **k: EKFAC(
        m, lr=0.05, basis_every=3, fisher="monte_carlo", likelihood="categorical", reduction="mean", **k
    ),
}


def twins(name, sizes=(4, 6)):
    case = build(name, sizes=sizes)
    case.model.train()
    return case, case.model, copy.deepcopy(case.model)


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def moved(model, before):
    return any(not torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_loop_with_blocks(kind, name):
    case, plain, model = twins(name)
    opt, auto = KINDS[kind](plain), KINDS[kind](model, automatic=True)
    before = [p.clone() for p in model.parameters()]
    for turn in range(5):
        x, y = case.loader[turn % 2]
        opt.zero_grad()
        with opt.observe():
            loss_of(plain, x, y).backward()
        opt.step()
        loss = loss_of(model, x, y)
        auto.zero_grad()
        loss.backward()
        auto.step()
    assert same(plain, model) and moved(model, before)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "ekfac-ra", "monte-carlo"])
def test_accumulation_with_other_passes_between(kind):
    case, plain, model = twins("conv2d", (2, 5, 3))
    opt, auto = KINDS[kind](plain), KINDS[kind](model, automatic=True)
    for _ in range(3):
        for x, y in case.loader:
            with opt.observe():
                (loss_of(plain, x, y) * len(x) / case.n).backward()
        opt.step()
        opt.zero_grad()
        for x, y in case.loader:
            if kind != "monte-carlo":  # the draws of a pass count it
                model(x + 1)  # in training mode, and dropped
            with torch.no_grad():
                model(x - 1)
            model.eval()
            F.cross_entropy(model(x * 2), y)  # of an evaluation, with gradients
            model.train()
            nng.FIM(model, [(x, y)], nng.PMatDiag, likelihood="categorical")
            (loss_of(model, x, y) * len(x) / case.n).backward()
        auto.step()
        auto.zero_grad()
    assert same(plain, model)


@pytest.mark.parametrize("name", ["mlp", "weight-norm"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac-ra", "diag"])
def test_several_passes_before_one_backward(kind, name):
    case, plain, model = twins(name, (4, 5))
    opt, auto = KINDS[kind](plain), KINDS[kind](model, automatic=True)
    (x, y), (z, t) = case.loader
    for _ in range(3):
        for net, how in ((plain, opt), (model, auto)):
            how.zero_grad()
            with opt.observe() if how is opt else torch.enable_grad():
                ((loss_of(net, x, y) * 4 + loss_of(net, z, t) * 5) / 9).backward()
            how.step()
    assert same(plain, model)


@pytest.mark.parametrize("name", ["weight-norm", "bare", "temperature"])
@pytest.mark.parametrize("kind", ["diag", "kfac"])
def test_parameters_with_one_row_a_batch_in_one_block_or_several(kind, name):
    case, plain, model = twins(name, (4, 5))
    blocks, block = KINDS[kind](plain), KINDS[kind](model)
    for x, y in case.loader:
        with blocks.observe():
            (loss_of(plain, x, y) * len(x) / 9).backward()
    with block.observe():
        for x, y in case.loader:
            (loss_of(model, x, y) * len(x) / 9).backward()
    assert block.observer.batchwise
    blocks.step()
    block.step()
    assert same(plain, model)


def test_an_explicit_block_goes_before():
    case, plain, model = twins("mlp")
    opt, auto = KINDS["ekfac"](plain), KINDS["ekfac"](model, automatic=True)
    for x, y in case.loader:
        for net, how in ((plain, opt), (model, auto)):
            how.zero_grad()
            with how.observe():
                loss_of(net, x, y).backward()
            assert how.pending.examples == len(x)
            how.step()
    assert same(plain, model)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("automatic", [False, True])
def test_a_closure_is_observed(automatic, inside):
    case, plain, model = twins("mlp")
    opt, other = KINDS["kfac"](plain), KINDS["kfac"](model, automatic=automatic)
    for x, y in case.loader:

        def closure(x=x, y=y):
            other.zero_grad()
            with other.observe() if inside else torch.enable_grad():
                loss = loss_of(model, x, y)
                loss.backward()
            return loss

        opt.zero_grad()
        with opt.observe():
            expected = loss_of(plain, x, y)
            expected.backward()
        opt.step()
        assert torch.equal(other.step(closure), expected)
    assert same(plain, model)
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == int(automatic)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_model_leaves_no_trace(error):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.broken, self.inner = False, build("mlp").model

        def forward(self, x):
            out = self.inner(x)
            if self.broken:
                raise error
            return out

    torch.manual_seed(0)
    case, model = build("mlp", sizes=(4, 6)), Breaks()
    plain = copy.deepcopy(model)
    opt, auto = KINDS["ekfac"](plain), KINDS["ekfac"](model, automatic=True)
    for x, y in case.loader:
        model.broken = True
        with pytest.raises(error):
            model(x)
        model.broken = False
        for net, how in ((plain, opt), (model, auto)):
            how.zero_grad()
            with opt.observe() if how is opt else torch.enable_grad():
                loss_of(net, x, y).backward()
            how.step()
    assert same(plain, model)
    assert not torch.overrides._get_current_function_mode_stack()


def token_of(out):
    """A weak reference to what only the graph of ``out`` holds."""
    token = type("Token", (), {})()
    out.grad_fn.metadata["token"] = token
    return weakref.ref(token)


@pytest.mark.parametrize(
    "name",
    [
        *NAMES,
        "attention",
        "embedding",
        "tied",
        "conv1d",
        "language-model",
        "einsum",
        "experts",
        "shared-table",
        "cross-attention",
        "rms-norm",
        "deconv2d",
        "bilinear",
    ],
)
@pytest.mark.parametrize("kind", ["kfac", "monte-carlo"])
def test_a_pass_that_is_dropped_is_freed(kind, name):
    case, _, model = twins(name)
    opt = KINDS[kind](model, automatic=True)
    token = token_of(model(case.inputs))
    assert token() is None and not opt.automatic.follower.calls and not opt.automatic.follower.arrived


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_after_a_step(kind):
    case, _, model = twins("conv2d")
    opt, tokens = KINDS[kind](model, automatic=True), []
    for x, y in case.loader:
        out = model(x)
        tokens.append(token_of(out))
        F.cross_entropy(out, y).backward()
        opt.step()
        opt.zero_grad()
        del out
        assert tokens[-1]() is None
    assert not opt.automatic.follower.calls


def test_the_model_outlives_the_optimizer():
    case, _, model = twins("mlp")
    opt = KINDS["kfac"](model, automatic=True)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None and not model._forward_hooks and not model._forward_pre_hooks
    model(case.inputs)


def test_copies_of_the_model_are_not_followed():
    case, _, model = twins("mlp")
    opt = KINDS["kfac"](model, automatic=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        loss_of(other, case.inputs, case.targets).backward()
        assert not opt.automatic.follower.arrived and not opt.automatic.follower.calls


@pytest.mark.parametrize("by", ["optimizer", "model"])
def test_what_zero_grad_drops_does_not_count(by):
    case, plain, model = twins("mlp")
    opt, auto = KINDS["ekfac"](plain), KINDS["ekfac"](model, automatic=True)
    (x, y), (z, t) = case.loader
    with opt.observe():
        loss_of(plain, x, y).backward()
    opt.step()
    out = model(x)
    for a, b in ((z, t), (x, y)):
        loss_of(model, a, b).backward()
    (auto if by == "optimizer" else model).zero_grad()
    F.cross_entropy(out, y).backward()
    auto.step()
    assert same(plain, model)


@pytest.mark.parametrize("kind", KINDS)
def test_what_zero_grad_drops_within_a_block_does_not_count(kind):
    """As adversarial training does, whose inputs come from a backward pass of their own; or between a loss and its
    backward pass.
    """
    case, plain, model = twins("mlp")
    opt, other = KINDS[kind](plain), KINDS[kind](model)
    (x, y), (z, t) = case.loader
    with opt.observe():
        loss_of(plain, x, y).backward()
    if kind == "monte-carlo":
        other.observer.drawn -= len(z)  # its draws come after those of the pass that does not count
    with other.observe():
        loss_of(model, z, t).backward()
        other.zero_grad()
        loss = loss_of(model, x, y)
        other.zero_grad()
        loss.backward()
    opt.step()
    other.step()
    assert same(plain, model)


def test_gradients_asked_for_by_name_do_not_count():
    case, plain, model = twins("mlp")
    opt, auto = KINDS["ekfac"](plain), KINDS["ekfac"](model, automatic=True)
    x, y = case.loader[0]
    with opt.observe():
        loss_of(plain, x, y).backward()
    loss = loss_of(model, x.clone().requires_grad_(), y)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    opt.step()
    auto.step()
    assert same(plain, model)


def test_what_is_refused():
    case, _, model = twins("mlp")
    opt = KINDS["kfac"](model, automatic=True)
    x, y = case.loader[0]
    assert opt.step() is None and opt.step(lambda: 3.0) == 3.0 and opt.clock.steps == 0  # nothing to step on
    model.eval()
    loss_of(model, x, y).backward()
    with pytest.raises(nng.ArgumentError, match="training mode"):
        opt.step()
    opt.zero_grad()
    model.train()
    with pytest.raises(nng.UnsupportedError, match="create_graph"):
        loss_of(model, x, y).backward(create_graph=True)
    opt.zero_grad()
    loss = loss_of(model, x, y)
    loss.backward(retain_graph=True)
    opt.automatic.collect()
    with pytest.raises(nng.ArgumentError, match="second backward"):
        loss.backward()
    opt.zero_grad()
    total = nn.Sequential(nn.Linear(4, 1), Total()).double()
    other = KFAC(total, automatic=True)
    with pytest.raises(nng.OutputError, match="outputs="):
        total(x)
    assert not other.automatic.follower.calls


class Total(nn.Module):
    def forward(self, x):
        return x.sum()


class Pair(nn.Module):
    """Outputs, and something beside."""

    def __init__(self):
        super().__init__()
        self.first, self.head, self.side = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.head(h), self.side(h)


def test_a_backward_pass_by_other_outputs_is_no_silent_loss():
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(6, 4)
    opt = KFAC(model, automatic=True)
    side = model(x)[1]
    with pytest.raises(nng.OutputError, match="outputs="):
        side.sum().backward()
    opt.zero_grad()
    out, side = model(x)
    (out.square().mean() + side.mean()).backward()
    assert opt.step() is None and opt.clock.steps == 1


class Blocks(nn.Module):
    """Two blocks, perhaps behind checkpoints."""

    def __init__(self, how=None):
        super().__init__()
        self.how, self.head = how, nn.Linear(6, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + (block(x) if self.how is None else checkpoint(block, x, use_reentrant=self.how == "reentrant"))
        return self.head(x)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "ekfac-ra"])
def test_gradient_checkpointing(kind):
    torch.manual_seed(0)
    plain, x = Blocks().double(), torch.randn(7, 6, dtype=torch.float64)
    y = torch.arange(7) % 3
    inside, whole = Blocks("blocks").double(), Blocks().double()
    inside.load_state_dict(plain.state_dict())
    whole.load_state_dict(plain.state_dict())
    opts = [KINDS[kind](plain), KINDS[kind](inside, automatic=True), KINDS[kind](whole, automatic=True)]
    for _ in range(3):
        for opt in opts:
            opt.zero_grad()
        with opts[0].observe():
            loss_of(plain, x, y).backward()
        loss_of(inside, x, y).backward()
        F.cross_entropy(checkpoint(whole, x, use_reentrant=False), y).backward()
        for opt in opts:
            opt.step()
    for other in (inside, whole):
        assert all(torch.allclose(p, q, rtol=1e-10) for p, q in zip(plain.parameters(), other.parameters()))
    reentrant = Blocks("reentrant").double()
    opt = KINDS[kind](reentrant, automatic=True)
    with pytest.raises(nng.UnsupportedError, match="use_reentrant=False"):
        reentrant(x.requires_grad_())
    del opt


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", ["kfac", "ekfac-ra"])
def test_grad_scaler(kind, unscale):
    case, plain, model = twins("mlp")
    opt, auto = KINDS[kind](plain), KINDS[kind](model, automatic=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    if unscale:
        auto.scaler = scaler
    for x, y in [*case.loader, *case.loader]:
        opt.zero_grad()
        auto.zero_grad()
        with opt.observe():
            loss_of(plain, x, y).backward()
        opt.step()
        scaler.scale(loss_of(model, x, y)).backward()
        if unscale:
            scaler.unscale_(auto)
        scaler.step(auto)
        scaler.update()
    assert all(torch.allclose(p, q, rtol=1e-10) for p, q in zip(plain.parameters(), model.parameters()))


def test_autocast():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model, x, y = copy.deepcopy(plain), torch.randn(16, 6), torch.arange(16) % 3
    opt, auto = KINDS["kfac"](plain), KINDS["kfac"](model, automatic=True)
    for _ in range(3):
        opt.zero_grad()
        auto.zero_grad()
        with opt.observe(), torch.autocast("cpu", torch.bfloat16):
            loss_of(plain, x, y).backward()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x, y)
        loss.backward()
        opt.step()
        auto.step()
    assert all(torch.allclose(p, q, rtol=1e-3, atol=1e-5) for p, q in zip(plain.parameters(), model.parameters()))


@pytest.mark.parametrize("kind", ["kfac", "ekfac-ra"])
def test_penalties_that_run_the_model_themselves(kind):
    case, plain, model = twins("mlp")
    opt, auto = KINDS[kind](plain), KINDS[kind](model, automatic=True)
    for x, y in case.loader * 2:
        opt.zero_grad()
        auto.zero_grad()
        with opt.observe():
            loss = loss_of(plain, x, y)
            (loss + 1e-2 * nng.mgs.trace_penalty(plain, x)).backward()
        opt.step()
        (loss_of(model, x, y) + 1e-2 * nng.mgs.trace_penalty(model, x)).backward()
        assert auto.automatic.follower.arrived[0].n == len(x) and len(auto.automatic.follower.arrived) == 1
        auto.step()
    assert same(plain, model)


def test_winsorized():
    case, plain, model = twins("mlp", (5, 6))
    opt, auto = WinsorizedSGD(plain, lr=0.05), WinsorizedSGD(model, lr=0.05, automatic=True)
    for _ in range(2):
        for x, y in case.loader:
            opt.zero_grad()
            auto.zero_grad()
            with opt.observe():
                loss_of(plain, x, y).backward()
            opt.step()
            loss_of(model, x, y).backward()
            auto.step()
    assert same(plain, model)


def test_resuming_is_bitwise():
    case, _, model = twins("conv2d")
    opt = KINDS["ekfac"](model, automatic=True)

    def train(opt, model, turns):
        for turn in turns:
            x, y = case.loader[turn % 2]
            opt.zero_grad()
            loss_of(model, x, y).backward()
            opt.step()

    train(opt, model, range(3))
    other = copy.deepcopy(model)
    again = KINDS["ekfac"](other, automatic=True)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, model, range(3, 6))
    train(again, other, range(3, 6))
    assert same(model, other)


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("given", ["compiled", "as written"])
def test_a_compiled_model(given, automatic):
    torch._dynamo.reset()
    plain, x = Blocks().double(), torch.randn(7, 6, dtype=torch.float64)
    y, model = torch.arange(7) % 3, copy.deepcopy(plain)
    compiled, ran = torch.compile(model, backend=counting(runs := [])), []
    opt = KINDS["kfac"](plain)
    other = KINDS["kfac"](compiled if given == "compiled" else model, automatic=automatic)
    for _ in range(4):
        opt.zero_grad()
        other.zero_grad()
        with opt.observe():
            loss_of(plain, x, y).backward()
        opt.step()
        before = len(runs)
        if given == "as written":
            with pytest.raises(nng.ArgumentError, match=r"torch\.compile"):
                with torch.enable_grad() if automatic else other.observe():
                    loss_of(compiled, x, y).backward()
                other.step()
            return
        with torch.enable_grad() if automatic else other.observe():
            loss_of(compiled, x, y).backward()
        ran.append(len(runs) > before)
        other.step()
    assert all(torch.allclose(p, q, rtol=1e-10) for p, q in zip(plain.parameters(), model.parameters()))
    assert ran == [False, True, False, True]  # steps whose statistics are due run as written, the others compiled
    torch._dynamo.reset()


def test_a_model_compiled_in_place_is_refused():
    torch._dynamo.reset()
    model, x = Blocks().double(), torch.randn(7, 6, dtype=torch.float64)
    opt = KINDS["kfac"](model, automatic=True)
    model.compile(backend="eager")
    loss_of(model, x, torch.arange(7) % 3).backward()
    with pytest.raises(nng.ArgumentError, match=r"torch\.compile"):
        opt.step()
    torch._dynamo.reset()


def counting(runs):
    """A compiler that leaves a mark whenever what it made runs."""

    def compiler(graph, inputs):
        def run(*args):
            runs.append(len(args))
            return graph.forward(*args)

        return run

    return compiler


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch 2.14 looks at it while it compiles
def test_compiled_parts_of_a_model():
    torch._dynamo.reset()
    plain, x = Blocks().double(), torch.randn(7, 6, dtype=torch.float64)
    y, model = torch.arange(7) % 3, copy.deepcopy(plain)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    opt, auto = KINDS["ekfac-ra"](plain), KINDS["ekfac-ra"](model, automatic=True)
    for _ in range(4):
        opt.zero_grad()
        auto.zero_grad()
        with opt.observe():
            loss_of(plain, x, y).backward()
        opt.step()
        loss_of(model, x, y).backward()
        auto.step()
    assert all(torch.allclose(p, q, rtol=1e-10) for p, q in zip(plain.parameters(), model.parameters()))
    torch._dynamo.reset()
