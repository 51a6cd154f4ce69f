"""Examples with a name: parameters that are held elsewhere than in their modules, or not reached at all."""

import copy

import pytest
import torch
from lacking import shards_on_cpu
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import nngeom as nng

from .named import Model, f64, holds, inputs, jacobian_holds, plain, truth

X = inputs(6)


# -- products by forward mode, of parameters that are held elsewhere ---------------------------------------------------


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


# -- nothing is reached ------------------------------------------------------------------------------------------------


def deep_copy(model):
    other = copy.deepcopy(model)
    return lambda x: other(x)


def detached_copies(model):
    copies = lambda: {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    return lambda x: functional_call(model, copies(), (x,))


def replaced_parameters(model):
    """As libraries that swap parameter objects do."""
    collection = nng.LayerCollection.from_model(model)
    for layer in (model.a, model.b):
        for name in ("weight", "bias"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach().clone()))
    assert collection.names
    other = copy.deepcopy(model)
    return lambda x: other(x)


@pytest.mark.parametrize("unreached", [deep_copy, detached_copies, replaced_parameters], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["PMatDiag", "PMatDense", "PMatKFAC", "PMatImplicit"])
def test_a_function_that_reaches_no_parameter_is_an_error(unreached, kind):
    model = Model(plain)
    with pytest.raises(nng.NNGeomError):
        nng.FIM(model, [X], getattr(nng, kind), function=unreached(model))


@pytest.mark.parametrize("unreached", [deep_copy, detached_copies], ids=lambda f: f.__name__)
def test_kernels_and_penalties_that_reach_no_parameter_are_an_error(unreached):
    model = Model(plain)
    penalty = lambda m, loader, function: nng.mgs.trace_penalty(m, loader[0], function=function)
    for measure in (nng.GramMatrix, nng.Jacobian, penalty):
        with pytest.raises(nng.NNGeomError):
            measure(model, [X], function=unreached(model))


@shards_on_cpu
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
