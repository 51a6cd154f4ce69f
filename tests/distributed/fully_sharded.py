"""Models under ``fully_shard``: the numbers of the whole model on all data, and parameters in parts afterwards."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import cuts
import torch
from cases import STORED, Case, build, representation
from launch import Check, Here, check, raises
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

import nngeom as nng

CHECKS: dict[str, Check] = {}
SMALL = ("mlp", "conv2d", "language-model", "gru", "transformer", "bare")
WIDE = (*SMALL, "tied", "reused", "prelu", "layer-norm", "batch-norm", "frozen", "class-token", "einsum")


def sharded(case: Case, here: Here, *, by_child: bool = True) -> nn.Module:
    """The model of a case under ``fully_shard``: a group for every child that shares no parameter, or one for all."""
    model, mesh = copy.deepcopy(case.model), init_device_mesh("cpu", (here.size,))
    owners: dict[int, set[str]] = {}
    for name, child in model.named_children():
        for p in child.parameters():
            owners.setdefault(id(p), set()).add(name)
    own = {id(p) for p in model.parameters(recurse=False)}
    for child in model.children() if by_child else ():
        parameters = list(child.parameters())
        if parameters and all(len(owners[id(p)]) == 1 and id(p) not in own for p in parameters):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hooks(model: nn.Module) -> list[list[object]]:
    """All hooks of a model, in order."""
    return [list(t.items()) for m in model.modules() for t in (m._forward_hooks, m._forward_pre_hooks)]


def in_parts(model: nn.Module) -> bool:
    """Whether parameters are in parts, and none has a gradient."""
    return all(hasattr(p, "placements") and p.grad is None for p in model.parameters())


def compare(here: Here, case: Case, model: nn.Module, measure: Callable, tolerance: float = 1e-12) -> None:
    """A measure of the sharded model on this rank's part against one of the whole model on all data."""
    before = hooks(model)
    one = measure(case.model, case.loader, process_group=None)
    many = measure(model, cuts.mine(case.loader, here.rank, here.size), process_group=here.group)
    assert float(one.abs().max()) > 1e-6
    cuts.close(many, one, tolerance)
    here.same(many)
    assert in_parts(model) and hooks(model) == before


MEASURES: dict[str, Callable] = {
    "FIM": lambda kind, m, data, **o: nng.FIM(m, data, representation(kind, m), **o).to_dense(),
    "empirical": lambda kind, m, data, **o: nng.EmpiricalFIM(
        m, data, representation(kind, m), loss="cross_entropy", **o
    ).to_dense(),
}


def listed(name: str, kind: str, measure: str = "FIM", *, by_child: bool = True) -> None:
    def f(here: Here) -> None:
        case = cuts.data(name)
        tolerance = 1e-10 if kind in ("ekfac", "mixed-sweeps") else 1e-12
        model = sharded(case, here, by_child=by_child)
        compare(here, case, model, lambda m, data, **o: MEASURES[measure](kind, m, data, **o), tolerance)

    CHECKS[f"{measure} {name} {kind} {'by child' if by_child else 'one group'}"] = f


for name in WIDE:
    listed(name, "dense", "empirical")
for name in ("mlp", "conv2d", "language-model"):
    for kind in ("diag", "kfac", "ekfac", "low-rank", "mixed"):
        listed(name, kind)
for kind in STORED:
    listed("mlp", kind, by_child=False)


PRODUCTS: dict[str, Callable] = {
    "implicit": lambda m, d, **o: nng.FIM(m, d, nng.PMatImplicit, **o).to_dense(),
    "implicit block": lambda m, d, **o: nng.FIM(m, d, nng.PMatImplicit, **o)["0"].to_dense(),
    "implicit diagonal": lambda m, d, **o: nng.FIM(m, d, nng.PMatImplicit, **o).diag().tensor,
    "solve": lambda m, d, **o: (
        nng.FIM(m, d, nng.PMatImplicit, **o).solve(nng.PVector.from_model(m), damping=0.1, tol=1e-12).tensor
    ),
    "Hessian": lambda m, d, **o: nng.Hessian(m, d, nng.PMatDense, loss="cross_entropy", **o).to_dense(),
    "Hessian diagonal": lambda m, d, **o: nng.Hessian(m, d, nng.PMatDiag, loss="cross_entropy", **o).to_dense(),
    "implicit Hessian": lambda m, d, **o: nng.Hessian(m, d, loss="cross_entropy", **o).to_dense(),
    "covariance": lambda m, d, **o: nng.GradientCovariance(m, d, nng.PMatDense, loss="cross_entropy", **o).to_dense(),
}


def product(name: str, measure: str) -> None:
    def f(here: Here) -> None:
        case = cuts.data(name)
        compare(here, case, sharded(case, here), PRODUCTS[measure], 1e-9 if measure == "solve" else 1e-12)

    CHECKS[f"{measure} {name}"] = f


for measure in PRODUCTS:
    product("mlp", measure)
for name in ("conv2d", "transformer"):
    for measure in ("implicit", "Hessian diagonal"):
        product(name, measure)


# -- what is left behind, and what is refused --------------------------------------------------------------------------


@check(CHECKS)
def parameters_are_in_parts_after_an_exception(here: Here) -> None:
    case = cuts.data("mlp")
    model, data = sharded(case, here), cuts.mine(case.loader, here.rank, here.size)
    before = hooks(model)

    def broken(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = model(x)
        raise ValueError(f"broken {out.shape}")

    kinds = (ValueError, nng.PeerError)  # the other process may be the first
    raises(kinds, "broken", lambda: nng.FIM(model, data, nng.PMatDiag, function=broken, process_group=here.group))
    assert in_parts(model) and hooks(model) == before
    some = lambda x, y: broken(x, y) if here.rank else model(x)
    kind = ValueError if here.rank else nng.PeerError
    raises(kind, "broken", lambda: nng.FIM(model, data, nng.PMatDiag, function=some, process_group=here.group))
    assert in_parts(model) and hooks(model) == before
    compare(here, case, model, lambda m, d, **o: nng.FIM(m, d, nng.PMatDiag, **o).to_dense())


@check(CHECKS)
def training_goes_on_as_if_nothing_was_measured(here: Here) -> None:
    case = cuts.data("mlp")
    data = cuts.mine(case.loader, here.rank, here.size)
    models = [sharded(case, here) for _ in range(2)]
    for step in range(4):
        for model in models:
            opt = torch.optim.SGD(model.parameters(), lr=0.1)
            if step == 1:  # between a forward and a backward pass too
                loss = nn.functional.cross_entropy(model(data[0][0]), data[0][1])
            if model is models[0]:
                nng.FIM(model, data, nng.PMatKFAC, process_group=here.group)
            if step != 1:
                loss = nn.functional.cross_entropy(model(data[0][0]), data[0][1])
            loss.backward()
            opt.step()
            opt.zero_grad()
    for p, q in zip(*(m.parameters() for m in models)):
        assert torch.equal(p.full_tensor(), q.full_tensor())


@check(CHECKS)
def a_vector_of_parts_is_whole(here: Here) -> None:
    case = cuts.data("transformer")
    model = sharded(case, here)
    assert torch.equal(nng.PVector.from_model(model).tensor, nng.PVector.from_model(case.model).tensor)
    x, y = case.loader[0][:2]
    for m in (model, case.model):
        nn.functional.cross_entropy(m(x), y).backward()
    cuts.close(nng.PVector.from_grad(model).tensor, nng.PVector.from_grad(case.model).tensor)


@check(CHECKS)
def only_some_of_the_parameters(here: Here) -> None:
    case = cuts.data("transformer")
    model = sharded(case, here)
    part = lambda m: nng.LayerCollection.from_model(m, include="*norm*")
    kind = nng.PMatDense
    compare(here, case, model, lambda m, d, **o: nng.FIM(m, d, kind, layer_collection=part(m), **o).to_dense())


@check(CHECKS)
def the_group_must_hold_all_that_hold_parts(here: Here) -> None:
    case = cuts.data("mlp")
    model, data = sharded(case, here), cuts.mine(case.loader, here.rank, here.size)
    text = f"sharded over {here.size} ranks"
    raises(nng.ArgumentError, text, lambda: nng.FIM(model, data))
    raises(nng.ArgumentError, text, lambda: nng.GramMatrix(model, data))
    raises(nng.ArgumentError, text, lambda: nng.FIM(model, data, process_group=torch.distributed.new_subgroups(1)[0]))
    mesh = init_device_mesh("cpu", (here.size,))
    compare(here, case, model, lambda m, d, process_group: group_or_none(m, d, process_group and mesh))


def group_or_none(m: nn.Module, data: list, group: object) -> torch.Tensor:
    """A diagonal."""
    return nng.FIM(m, data, nng.PMatDiag, process_group=group).to_dense()


class Named(nn.Module):
    """A model that is run by a method of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 3)

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


@check(CHECKS)
def methods_that_gather_and_part_run_as_they_are_written(here: Here) -> None:
    case = cuts.data("mlp")
    case = dataclasses.replace(case, model=Named().double())
    model = sharded(case, here, by_child=False)
    register_fsdp_forward_method(model, "outputs")
    before = vars(model)["outputs"]
    measure = lambda m, d, **o: nng.FIM(m, d, nng.PMatDense, function=lambda x, y: m.outputs(x), **o).to_dense()
    compare(here, case, model, measure)
    assert vars(model)["outputs"] is before


@check(CHECKS)
def parameters_that_are_parted_in_the_middle_are_refused(here: Here) -> None:
    case = cuts.data("mlp")
    model, data = sharded(case, here), cuts.mine(case.loader, here.rank, here.size)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = model(x)
        model[0].reshard()
        return out

    call = lambda: nng.FIM(model, data, nng.PMatDiag, function=function, process_group=here.group)
    raises((nng.UnsupportedError, nng.PeerError), "reshard nothing", call)  # the other process may be the first
    assert in_parts(model)


@check(CHECKS)
def casts_of_a_mixed_precision_policy_stay(here: Here) -> None:
    case = build("mlp", torch.float32, sizes=cuts.SIZES)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model = fully_shard(copy.deepcopy(case.model), mesh=init_device_mesh("cpu", (here.size,)), mp_policy=policy)
    half = case.model.bfloat16()
    function = lambda m: None if m is model else lambda x, y: m(x.bfloat16()).float()
    measure = lambda m, d, **o: nng.FIM(m, d, nng.PMatDense, function=function(m), **o).to_dense()
    compare(here, case, model, measure, 1e-6)  # sums are in float32
    assert half[0].weight.dtype == torch.bfloat16
