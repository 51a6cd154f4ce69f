"""Models as other tools hand them over: compiled, scripted, exported, replicated, spread over processes, with hooks."""

import copy
import subprocess
import sys
import textwrap
import threading

import pytest
import reference
import torch
from exactness import close, require_kernels, require_matrices
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom import optim
from nngeom.capture.compiled import as_written
from nngeom.capture.network import Network

f64 = torch.float64


class Mixed(nn.Module):
    """Linear maps, a norm, a scalar and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.t, self.e = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return self.b(torch.tanh(self.norm(self.a(x)))) * self.t.exp() + self.e


class Convolutional(nn.Module):
    """A convolution and a head."""

    def __init__(self):
        super().__init__()
        self.c, self.h = nn.Conv1d(1, 3, 2, padding=1), nn.Linear(15, 3)

    def forward(self, x):
        return self.h(torch.relu(self.c(x[:, None])).flatten(1))


class Attending(nn.Module):
    """A transformer layer over two tokens."""

    def __init__(self):
        super().__init__()
        self.layer, self.h = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.h(self.layer(torch.stack([x, x.flip(1)], 1))).mean(1)


class Around(nn.Module):
    """A part made by another tool, and a layer of one's own."""

    def __init__(self, part):
        super().__init__()
        self.part, self.own = part, nn.Linear(3, 3, dtype=f64)

    def forward(self, x):
        return self.own(self.part(x).tanh())


class Calling(Around):
    """The same with a compiled function in place of a compiled module."""

    def __init__(self, part):
        super().__init__(part)
        self.function = torch.compile(lambda x: self.part(x).tanh(), backend="aot_eager")

    def forward(self, x):
        return self.own(self.function(x))


def compiled_in_place(model):
    model.compile(backend="aot_eager")
    return model


def exported(model):
    sizes = ({0: torch.export.Dim("n", max=1024)},)
    return torch.export.export(model, (torch.randn(5, 4, dtype=f64),), dynamic_shapes=sizes).module()


WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="aot_eager"),
    "compiled by inductor's front": lambda m: torch.compile(m, backend="eager"),
    "compiled in place": compiled_in_place,
    "compiled part": lambda m: Around(torch.compile(m, backend="aot_eager")),
    "compiled function": Calling,
    "scripted": torch.jit.script,
    "scripted part": lambda m: Around(torch.jit.script(m)),
    "traced": lambda m: torch.jit.trace(m, torch.randn(5, 4, dtype=f64)),
    "symbolically traced": torch.fx.symbolic_trace,
    "exported": exported,
    "replicated": nn.DataParallel,
    "replicated part": lambda m: Around(nn.DataParallel(m)),
    "averaged": torch.optim.swa_utils.AveragedModel,
}
MODELS = {"mixed": Mixed, "convolutional": Convolutional, "attending": Attending}
UNTRACED = {("attending", "traced")}  # torch's own check of its trace fails


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_exact_in_every_object(model, wrapper):
    if (model, wrapper) in UNTRACED:
        pytest.skip("torch does not trace it")
    torch.manual_seed(0)
    plain, x = MODELS[model]().double().eval(), torch.randn(5, 4, dtype=f64)
    wrapped, expected = WRAPPERS[wrapper](copy.deepcopy(plain)), plain
    if isinstance(wrapped, Around):
        expected = Around(copy.deepcopy(plain))
        expected.own.load_state_dict(wrapped.own.state_dict())
    rows = reference.jacobian(expected, x)
    require_matrices(wrapped, x, rows=rows)
    require_kernels(wrapped, x, rows=rows)
    if model != "attending":  # fused attention has no second derivative of its own to compare with
        loss = lambda f, y: F.cross_entropy(f, y, reduction="none")
        h = reference.hessian(expected, x, torch.arange(5) % 3, loss)
        close(nng.Hessian(wrapped, (x, torch.arange(5) % 3), nng.PMatDense, loss="cross_entropy").to_dense(), h)


@pytest.mark.parametrize("wrapper", ["compiled", "compiled in place", "compiled part"])
def test_what_is_compiled_keeps_its_structure_and_stays_compiled(wrapper):
    model, x = WRAPPERS[wrapper](Mixed().double()), torch.randn(5, 4, dtype=f64)
    report = nng.explain(model, x)
    assert {row.structure for row in report.rows if row.name.endswith("a.weight")} == {"kronecker"}
    with torch._dynamo.config.patch(error_on_recompile=False):
        torch._dynamo.utils.counters.clear()
        model(x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_the_compiler_comes_back_after_nested_and_concurrent_calls():
    model, x = torch.compile(nn.Linear(4, 3), backend="aot_eager"), torch.randn(5, 4)
    compiled = lambda: "Compiled" in type(model(x).grad_fn).__name__
    assert compiled()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with as_written():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with as_written(), as_written():
        assert not compiled()
        thread.start()
        assert inside.wait(10)
    assert not compiled()  # the other thread is inside still
    leave.set()
    thread.join()
    assert compiled()
    with pytest.raises(ZeroDivisionError), as_written():
        raise ZeroDivisionError
    assert compiled()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("compiled", "compiled in place", "compiled part")]


@pytest.mark.parametrize("wrapper", ["replicated", "symbolically traced", *SLOW])
@pytest.mark.filterwarnings("ignore")
def test_optimizers_step_as_on_the_plain_model(wrapper):
    x, y = torch.randn(6, 4, dtype=f64), torch.arange(6) % 3

    def stepped(wrap):
        torch.manual_seed(0)
        model = wrap(Mixed().double())
        optimizer = optim.KFAC(model, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.observe():
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return nng.PVector.from_model(model).flat()

    close(stepped(WRAPPERS[wrapper]), stepped(Around if wrapper == "compiled part" else lambda m: m))


# -- parameters in parts -----------------------------------------------------------------------------------------------


def in_a_process(code: str) -> str:
    """What ``code`` prints in a process that is the only member of a gloo group, ended after two minutes."""
    start = """
        import torch, torch.distributed as dist
        from torch import nn
        from torch.distributed.device_mesh import init_device_mesh
        import nngeom as nng
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        mesh, x = init_device_mesh("cpu", (1,)), torch.randn(5, 4)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    """
    text = textwrap.dedent(start) + textwrap.dedent(code) + "\ndist.destroy_process_group()\n"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", text], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


SPREAD = """
    import copy
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import DTensor, Replicate, distribute_module
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    sharded, parallel, distributed, whole = (copy.deepcopy(model) for _ in range(4))
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    parallelize_module(parallel, mesh, {"0": ColwiseParallel()})
    replicated = lambda _, args, mesh: tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in args)
    distribute_module(distributed, mesh, input_fn=replicated)
    SHARDED = hasattr(torch.cpu.Stream, "record_event")  # torch 2.6 does not run fully_shard on a CPU
"""


def test_what_needs_whole_parameters_refuses_those_spread_over_processes():
    in_a_process(
        textwrap.dedent(SPREAD)
        + textwrap.dedent("""
        flat = FullyShardedDataParallel(copy.deepcopy(model), device_id=torch.device("cpu"))
        calls = [
            lambda m: nng.optim.WinsorizedSGD(m), lambda m: nng.mgs.trace_penalty(m, x), lambda m: nng.explain(m, x),
            lambda m: nng.mgs.loss_gradient_penalty(m, x, torch.arange(5) % 3), lambda m: nng.diagnose(m, x),
            lambda m: nng.GramMatrix(m, x, differentiable=True), lambda m: nng.linearized.Linearized(m),
            lambda m: nng.track.Tracker(m, x), lambda m: nng.analysis.ComplexityMeasure(m, x),
        ]
        measures = [lambda m: nng.FIM(m, x), lambda m: nng.GramMatrix(m, x), lambda m: nng.Jacobian(m, x)]
        for m in (sharded, parallel, distributed, flat):
            train = [lambda m: nng.optim.KFAC(m)]
            for call in calls + measures * (m is flat) + train * (m is not sharded):
                try:
                    call(m)
                    raise SystemExit(f"no error of {call.__code__.co_consts} on {type(m)}")
                except nng.UnsupportedError as error:
                    assert "spread over processes" in str(error) and "full_state_dict" in str(error), error
        for p in whole.parameters():  # and what the error says works
            p.data.zero_()
        whole.load_state_dict(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)))
        expected = nng.FIM(model, x, nng.PMatDense).to_dense()
        assert torch.allclose(nng.FIM(whole, x, nng.PMatDense).to_dense(), expected)
        """)
    )


def test_measures_of_parameters_that_may_be_spread_over_processes():
    in_a_process(
        textwrap.dedent(SPREAD)
        + textwrap.dedent("""
        y = torch.arange(5) % 3
        measures = [
            lambda m: nng.FIM(m, x, nng.PMatDense).to_dense(), lambda m: nng.FIM(m, x).to_dense(),
            lambda m: nng.FIM(m, x, nng.PMatImplicit).to_dense(), lambda m: nng.GramMatrix(m, x).to_dense(),
            lambda m: nng.FIM(m, x, nng.PMatImplicit)["0"].to_dense(),
            lambda m: nng.GramMatrix(m, x, nng.FMatImplicit).to_dense(), lambda m: nng.Jacobian(m, x).rows(),
            lambda m: nng.EmpiricalFIM(m, (x, y), nng.PMatEKFAC, loss="cross_entropy").to_dense(),
            lambda m: nng.PVector.from_model(m).tensor,
        ]
        second = lambda m: nng.Hessian(m, (x, y), nng.PMatDense, loss="cross_entropy").to_dense()
        for m in (sharded, parallel, distributed) if SHARDED else (parallel, distributed):
            for measure in measures + [second] * (m is sharded):
                one, other = measure(model), measure(m)
                assert torch.allclose(one, other, atol=1e-6 * float(one.abs().max())), (one - other).abs().max()
            assert all(hasattr(p, "placements") for p in m[0].parameters())
        for m in (parallel, distributed):
            try:
                second(m)
                raise SystemExit("no error")
            except nng.UnsupportedError as error:
                assert "tensor parallelism" in str(error), error
        """)
    )


def test_parameters_that_are_elsewhere_are_no_empty_ones():
    model = nn.Linear(4, 3)
    model.weight.data, model.weight.ds_numel = torch.empty(0), 12  # as a partitioned parameter of ZeRO-3
    with pytest.raises(nng.UnsupportedError, match="ZeRO-3"):
        nng.FIM(model, torch.randn(5, 4))


# -- parameters with hooks ---------------------------------------------------------------------------------------------


def test_hooked_parameters_are_named():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    network = Network.build(model, None, None)
    assert network.hooked == set()
    first, second = model[0].weight.register_hook(lambda g: 2 * g), model[1].bias.register_hook(lambda g: None)
    assert network.hooked == {"0.weight", "1.bias"}
    first.remove()
    assert network.hooked == {"1.bias"}
    second.remove()
    model[0].weight.register_post_accumulate_grad_hook(
        lambda p: None
    )  # sees what backward() leaves behind, not gradients
    assert network.hooked == set()


HOOKS = {
    "twice": lambda g: 2 * g,
    "masked": lambda g: g * (torch.arange(g.numel()).view(g.shape) % 2),
    "watched": lambda g: None,
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["a.weight", "norm.weight", "t", "e", "b.bias"])
def test_rows_are_those_that_the_hook_leaves(hook, name):
    model, x = Mixed().double(), torch.randn(5, 4, dtype=f64)
    dict(model.named_parameters())[name].register_hook(HOOKS[hook])
    rows = reference.jacobian(model, x)
    close(nng.Jacobian(model, x).tensor, rows)
    close(nng.GramMatrix(model, x).tensor, torch.einsum("cnd,emd->cnem", rows, rows))


@pytest.mark.parametrize("name", ["a.weight", "norm.weight", "t", "e", "b.bias"])
def test_hooks_that_are_not_linear_leave_no_jacobian(name):
    model, x = Mixed().double(), torch.randn(5, 4, dtype=f64)
    dict(model.named_parameters())[name].register_hook(lambda g: g.clamp(-0.05, 0.05))
    for measure in (nng.Jacobian, nng.GramMatrix):
        with pytest.raises(nng.CoverageError, match="not linear"):
            measure(model, x)
