"""Examples with a name: parameters held elsewhere, random or stateful passes, nothing reached, what was measured before."""

import contextlib
import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import nngeom as nng

from .named import Model, f64, holds, inputs, jacobian_holds, truth
from .state import same, state_of

X = inputs(6)


def plain(m, x):
    return m.b(m.a(x).tanh())


# -- products by forward mode, of parameters that are held elsewhere -------------------------------------------------


def closure():
    model = Model(plain)
    weight = model.b.weight
    return model, lambda x: F.linear(model.a(x).tanh(), weight)


def python_list():
    model = Model(plain)
    held = [model.a.weight, model.b.weight]
    return model, lambda x: F.linear(F.linear(x, held[0]).tanh(), held[1])


def listed_inside():
    model = Model(lambda m, x: F.linear(F.linear(x, m.held[0]).tanh(), m.held[1]))
    model.held = [model.a.weight, model.b.weight]
    return model, None


def scripted():
    torch.manual_seed(0)
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 5).double()), nn.Tanh(), nn.Linear(5, 3).double())
    return model, None


def hooked():
    model = Model(plain)
    model.a.weight.register_hook(lambda g: 2 * g)
    return model, None


def reversed_gradient():
    def forward(m, x):
        h = m.a(x).tanh()
        if h.requires_grad:
            h.register_hook(lambda g: -g)
        return m.b(h)

    return Model(forward), None


HELD = [closure, python_list, listed_inside, scripted, hooked, reversed_gradient]


@pytest.mark.parametrize("held", HELD, ids=lambda f: f.__name__)
def test_implicit_products_of_parameters_held_elsewhere(held):
    model, call = held()
    t = truth(model, X, call=call)
    function = None if call is None else lambda x: call(x)
    v = torch.randn(t.rows.shape[-1], dtype=f64)
    u = torch.randn(t.rows.shape[:2], dtype=f64)

    def forward():
        j = nng.Jacobian(model, [X], nng.PushForwardImplicit, function=function)
        return j.mv(nng.PVector.from_flat(j.layer_collection, v)).tensor

    def backward():
        return nng.Jacobian(model, [X], nng.PushForwardImplicit, function=function).T.mv(nng.FVector(u)).flat()

    def fisher():
        m = nng.FIM(model, [X], nng.PMatImplicit, function=function)
        return m.mv(nng.PVector.from_flat(m.layer_collection, v)).flat()

    holds(forward, lambda: t.rows @ v)
    holds(backward, lambda: torch.einsum("cn,cnd->d", u, t.rows))
    holds(fisher, lambda: t.fisher @ v)


@pytest.mark.parametrize("held", HELD, ids=lambda f: f.__name__)
def test_rows_of_parameters_held_elsewhere(held):
    model, call = held()
    jacobian_holds(model, X, call=call)


# -- random and stateful passes --------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Counts and averages in buffers; neither is read."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3, dtype=f64)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(3, dtype=f64))

    def forward(self, x):
        y = self.a(x)
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        return y


def spectral():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3).double())).train()


def drop_path(m, x):
    h = m.a(x).tanh()
    return m.b(h * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.8))


RANDOM = {
    "drop path": drop_path,
    "gumbel softmax": lambda m, x: m.b(F.gumbel_softmax(m.a(x))),
    "randn_like": lambda m, x: m.b(m.a(x) + torch.randn_like(m.a(x))),
    "multinomial": lambda m, x: m.b(m.a(x) * F.one_hot(m.a(x).detach().softmax(1).multinomial(1)[:, 0], 5)),
    "numpy": lambda m, x: m.b(m.a(x) * np.random.rand()),
    "python": lambda m, x: m.b(m.a(x) * random.random()),
}
MEASURES = {
    "FIM": lambda model: nng.FIM(model, [X], nng.PMatDiag),
    "KFAC": lambda model: nng.FIM(model, [X], nng.PMatKFAC),
    "EmpiricalFIM": lambda model: nng.EmpiricalFIM(model, [(X, torch.arange(6) % 3)], nng.PMatDense, loss="cross_entropy"),
    "GramMatrix": lambda model: nng.GramMatrix(model, [X]),
    "Hessian": lambda model: nng.Hessian(model, [(X, torch.arange(6) % 3)], nng.PMatDiag, loss="cross_entropy"),
    "trace_penalty": lambda model: nng.mgs.trace_penalty(model, X),
}


@pytest.mark.parametrize("noise", RANDOM)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_random_pass_is_a_mode_error_and_draws_are_put_back(noise, measure):
    model = Model(RANDOM[noise])
    before = state_of(model)
    with pytest.raises(nng.ModeError):
        MEASURES[measure](model)
    assert [name for name, value in state_of(model).items() if not same(value, before[name])] == []


@pytest.mark.parametrize("make", [Stateful, spectral], ids=lambda f: f.__name__)
@pytest.mark.parametrize("measure", MEASURES)
def test_measuring_does_not_change_buffers(make, measure):
    model = make()
    before = state_of(model)
    with contextlib.suppress(nng.NNGeomError):
        MEASURES[measure](model)
    assert [name for name, value in state_of(model).items() if not same(value, before[name])] == []


# -- nothing is reached ----------------------------------------------------------------------------------------------


def deep_copy(model):
    other = copy.deepcopy(model)
    return lambda x: other(x)


def detached_copies(model):
    return lambda x: functional_call(model, {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}, (x,))


def replaced_parameters(model):
    """As libraries that swap parameter objects do."""
    collection = nng.LayerCollection.from_model(model)
    for layer in (model.a, model.b):
        layer.weight, layer.bias = nn.Parameter(layer.weight.detach().clone()), nn.Parameter(layer.bias.detach().clone())
    assert collection.names
    other = copy.deepcopy(model)
    return lambda x: other(x)


@pytest.mark.parametrize("unreached", [deep_copy, detached_copies, replaced_parameters], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [nng.PMatDiag, nng.PMatDense, nng.PMatKFAC, nng.PMatImplicit], ids=lambda k: k.__name__)
def test_a_function_that_reaches_no_parameter_is_an_error(unreached, kind):
    model = Model(plain)
    with pytest.raises(nng.NNGeomError):
        nng.FIM(model, [X], kind, function=unreached(model))


@pytest.mark.parametrize("unreached", [deep_copy, detached_copies], ids=lambda f: f.__name__)
def test_kernels_and_penalties_that_reach_no_parameter_are_an_error(unreached):
    model = Model(plain)
    for measure in (nng.GramMatrix, nng.Jacobian, lambda m, loader, function: nng.mgs.trace_penalty(m, loader[0], function=function)):
        with pytest.raises(nng.NNGeomError):
            measure(model, [X], function=unreached(model))


def test_a_sharded_model_is_right_or_refused(tmp_path):
    """``fully_shard`` puts other parameter objects in the modules while they run."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        want, model = truth(Model(plain), X).fisher, Model(plain)
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        holds(lambda: nng.FIM(model, [X], nng.PMatDense).to_dense(), want)
        holds(lambda: nng.FIM(model, [X], nng.PMatDiag).trace(), want.trace())
    finally:
        dist.destroy_process_group()


# -- what was measured before ----------------------------------------------------------------------------------------


def test_a_parameter_hook_that_comes_and_goes():
    model = Model(plain)
    jacobian_holds(model, X)
    handle = model.a.weight.register_hook(lambda g: 3 * g)
    jacobian_holds(model, X)
    handle.remove()
    jacobian_holds(model, X)


def test_a_tensor_hook_whose_closure_changes():
    factor = [1.0]

    def forward(m, x):
        h = m.a(x).tanh()
        if h.requires_grad:
            h.register_hook(lambda g: factor[0] * g)
        return m.b(h)

    model = Model(forward)
    for factor[0] in (1.0, -0.5, 0.0, 2.0):
        jacobian_holds(model, X)


class Turned(torch.autograd.Function):
    """The identity, or the examples turned round, by a flag."""

    @staticmethod
    def forward(ctx, x, flag):
        ctx.flag = flag
        return x.flip(0) if flag else x.clone()

    @staticmethod
    def backward(ctx, g):
        return (g.flip(0) if ctx.flag else g), None


def test_a_flag_of_a_custom_function():
    def forward(m, x):
        return m.b(Turned.apply(m.a(Turned.apply(x, m.flag)).tanh(), m.flag))

    model = Model(forward)
    for model.flag in (False, True, False):
        jacobian_holds(model, X)


def test_a_plain_attribute_that_changes_the_function():
    model = Model(lambda m, x: m.b(m.a(x).tanh()) / m.temperature)
    for model.temperature in (1.0, 3.0, 0.5):
        jacobian_holds(model, X)
