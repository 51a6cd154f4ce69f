"""Models under ``fully_shard`` whose parameters are whole only while they are used: the numbers of the whole model."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import cuts
import pytest
import torch
import torch.distributed as dist
from cases import STORED, Case, build, representation
from fully_sharded import Named, hooks, in_parts, sharded
from lacking import TELLS_WHOSE_HOOKS
from launch import Check, Here, check, raises
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

import nngeom as nng

CHECKS: dict[str, Check] = {}
SMALL = ("mlp", "conv2d", "language-model", "gru", "transformer", "bare")
DENSE = {
    "FIM": lambda kind, m, data, **o: nng.FIM(m, data, representation(kind, m), **o).to_dense(),
    "empirical": lambda kind, m, data, **o: nng.EmpiricalFIM(
        m, data, representation(kind, m), loss="cross_entropy", **o
    ).to_dense(),
}


def short_of(model: nn.Module) -> int:
    """A budget in which the parameters have no room."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) - 1


def in_turn(
    here: Here, case: Case, model: nn.Module, measure: Callable, tolerance: float = 1e-9, **options: Any
) -> None:
    """A measure of the sharded model on this rank's part against one of the whole model on all data."""
    before = hooks(model)
    one = measure(case.model, case.loader, process_group=None)
    mine = cuts.mine(case.loader, here.rank, here.size)
    with warnings.catch_warnings():
        if TELLS_WHOSE_HOOKS or not any(isinstance(m, nn.RNNBase) for m in model.modules()):
            warnings.simplefilter("error", nng.MemoryWarning)  # of a model that is gathered after all
        warnings.filterwarnings("ignore", "memory_budget is")
        many = measure(model, mine, process_group=here.group, memory_budget=short_of(case.model))
    assert float(one.abs().max()) > 1e-6
    cuts.close(many, one, 1e-9)
    here.same(many)
    assert in_parts(model) and hooks(model) == before


def listed(
    name: str, kind: str, measure: str = "FIM", *, by_child: bool = True, checks: dict[str, Check] = CHECKS
) -> None:
    def f(here: Here) -> None:
        case = cuts.data(name)
        in_turn(here, case, sharded(case, here, by_child=by_child), functools.partial(DENSE[measure], kind))

    checks[f"in turn, {measure} {name} {kind} {'by child' if by_child else 'one group'}"] = f


for name in SMALL:
    listed(name, "kfac", by_child=False)
for name in ("mlp", "conv2d"):
    listed(name, "dense", "empirical")
for kind in STORED:
    if kind != "kfac":
        listed("mlp" if kind != "ekfac" else "language-model", kind)


OTHERS: dict[str, Callable] = {
    "Monte Carlo": lambda m, d, **o: nng.FIM_MonteCarlo(
        m, d, nng.PMatDense, samples=2, generator=torch.Generator().manual_seed(3), **o
    ).to_dense(),
    "probes": lambda m, d, **o: nng.FIM(
        m, d, nng.PMatKFAC, estimator="rademacher", generator=torch.Generator().manual_seed(3), **o
    ).matrix.to_dense(),
    "GGN": lambda m, d, **o: nng.GGN(m, d, nng.PMatBlockDiag, loss="cross_entropy", **o).to_dense(),
    "covariance": lambda m, d, **o: nng.GradientCovariance(m, d, nng.PMatDense, loss="cross_entropy", **o).to_dense(),
    "centred": lambda m, d, **o: nng.FIM(m, d, nng.PMatEKFAC, centered=True, **o).to_dense(),
    "streamed": lambda m, d, **o: (
        nng.FIM(m, d, nng.PMatSharded.of(nng.PMatEKFAC, streamed=True), **o).gather().to_dense()
    ),
    "parts": lambda m, d, **o: nng.FIM(m, d, nng.PMatSharded.of(nng.PMatEKFAC), **o).gather().to_dense(),
}
for measure in OTHERS:
    CHECKS[f"in turn, {measure}"] = lambda here, f=OTHERS[measure]: in_turn(
        here, case := cuts.data("mlp"), sharded(case, here), f
    )


# -- what is whole, and when -------------------------------------------------------------------------------------------


@check(CHECKS)
def few_parameters_are_whole_at_once(here: Here) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(8)]
    net = nn.Sequential(*layers, nn.Linear(16, 3)).double()
    model, mesh = copy.deepcopy(net), init_device_mesh("cpu", (here.size,))
    fully_shard(model, mesh=mesh)  # all in one group
    x = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    held: list[int] = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        for layer in model:
            x = layer(x)
            with torch._C.DisableTorchFunction():
                held.append(sum(p.untyped_storage().nbytes() for p in model.parameters()))
        return x

    m = nng.FIM(model, (x,), nng.PMatKFAC, function=watched, memory_budget=short_of(net), process_group=here.group)
    cuts.close(m.to_dense(), nng.FIM(net, (x,), nng.PMatKFAC).to_dense(), 1e-9)
    assert held and max(held) <= short_of(net) // 4 + 100 and in_parts(model), held


@check(CHECKS)
def passes_differ_between_processes(here: Here) -> None:
    """The last process has most batches, the first none but has to know each graph by itself."""
    case = cuts.data("transformer")
    model = sharded(case, here)
    mine = case.loader if here.rank == here.size - 1 else []
    measure = lambda m, d, **o: nng.FIM(m, d, nng.PMatEKFAC, **o).to_dense()
    found = measure(model, mine, process_group=here.group, memory_budget=short_of(case.model))
    cuts.close(found, measure(case.model, case.loader), 1e-9)
    here.same(found)


@check(CHECKS)
def checkpointed_layers_are_computed_again(here: Here) -> None:
    case = cuts.data("transformer")
    plain, model = copy.deepcopy(case.model), copy.deepcopy(case.model)
    for net in (plain, model):
        for name, child in list(net.named_children()):
            if list(child.parameters()) and not isinstance(child, nn.Embedding):
                setattr(net, name, checkpoint_wrapper(child))
    fully_shard(model, mesh=init_device_mesh("cpu", (here.size,)))
    mine = cuts.mine(case.loader, here.rank, here.size)
    measure = lambda m, d, **o: nng.FIM(m, d, nng.PMatKFAC, **o).to_dense()
    found = measure(model, mine, process_group=here.group, memory_budget=short_of(case.model))
    cuts.close(found, measure(plain, case.loader), 1e-9)


class Tied(nn.Module):
    """A model that reads a parameter of a module that it does not run, and runs a method of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Named()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.outputs(x) + x @ (self.inner.up.weight.T * 2)[:, :3]


@check(CHECKS)
def parameters_that_no_module_is_run_with(here: Here) -> None:
    case = build("mlp", sizes=cuts.SIZES)
    net = Tied().double()
    model = fully_shard(copy.deepcopy(net), mesh=init_device_mesh("cpu", (here.size,)))
    register_fsdp_forward_method(model.inner, "outputs")
    measure = lambda m, d, **o: nng.FIM(m, d, nng.PMatDense, **o).to_dense()
    mine = cuts.mine(case.loader, here.rank, here.size)
    found = measure(model, mine, process_group=here.group, memory_budget=short_of(net))
    cuts.close(found, measure(net, case.loader), 1e-9)


@check(CHECKS)
def casts_of_a_policy_stay_in_turn(here: Here) -> None:
    case = build("mlp", torch.float32, sizes=cuts.SIZES)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model = fully_shard(copy.deepcopy(case.model), mesh=init_device_mesh("cpu", (here.size,)), mp_policy=policy)
    half = case.model.bfloat16()
    one = nng.FIM(half, case.loader, nng.PMatDense, function=lambda x, y: half(x.bfloat16()).float())
    mine = cuts.mine(case.loader, here.rank, here.size)
    many = nng.FIM(model, mine, nng.PMatDense, memory_budget=short_of(half), process_group=here.group)
    cuts.close(many.to_dense(), one.to_dense(), 1e-6)  # sums are in float32
    assert in_parts(model)


@check(CHECKS)
def saved_numbers_that_are_overwritten_are_found(here: Here) -> None:
    """As where no hooks stand between."""
    case = cuts.data("mlp")
    model = sharded(case, here)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = model[0](x).exp()
        out = model[2](h)
        h.mul_(2.0)
        return out

    mine = cuts.mine(case.loader, here.rank, here.size)
    options = {"function": function, "process_group": here.group, "memory_budget": short_of(case.model)}
    kinds = (RuntimeError, nng.NNGeomError)
    raises(kinds, "place", lambda: nng.FIM(model, mine, nng.PMatDiag, **options))
    assert in_parts(model)


WRITERS: dict[str, Callable[[nn.Module], object]] = {
    "by data": lambda model: model[0].weight.data.clamp_(-0.1, 0.1),
    "itself": lambda model: model[2].weight.mul_(0.5),
    "a view": lambda model: model[2].weight[0].zero_(),
}


def written(how: str) -> None:
    def f(here: Here) -> None:
        case = cuts.data("mlp")
        model, mine = sharded(case, here), cuts.mine(case.loader, here.rank, here.size)

        def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            h = model[0](x)
            with torch.no_grad():
                WRITERS[how](model)
            return model[2](h)

        options = {"process_group": here.group, "memory_budget": short_of(case.model)}
        kinds = (nng.ModeError, nng.PeerError)
        raises(
            kinds, "changes the parameters", lambda: nng.FIM(model, mine, nng.PMatDiag, function=function, **options)
        )
        in_turn(here, case, model, functools.partial(DENSE["FIM"], "diag"))  # nothing is left of it

    CHECKS[f"parameters that are written, {how}"] = f


for how in WRITERS:
    written(how)


@check(CHECKS)
def what_is_no_parameter_is_written(here: Here) -> None:
    case = cuts.data("mlp")

    def measure(model: nn.Module, data: Any, **options: Any) -> torch.Tensor:
        def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return model[2](model[0](x.clone().mul_(0.5)).relu_()).add_(1.0)

        return nng.FIM(model, data, nng.PMatKFAC, function=function, **options).to_dense()

    in_turn(here, case, sharded(case, here), measure)


@check(CHECKS)
def recurrent_layers_of_a_torch_that_does_not_tell(here: Here) -> None:
    """Whose hooks on saved tensors come first: their parameters are gathered, and the numbers are the same."""
    case = cuts.data("gru")
    model, mine = sharded(case, here), cuts.mine(case.loader, here.rank, here.size)
    options = {"process_group": here.group, "memory_budget": short_of(case.model)}
    with pytest.MonkeyPatch.context() as patch, pytest.warns(nng.MemoryWarning, match="is gathered for this measure"):
        patch.setattr("nngeom.capture.in_turn._TOP", None)
        many = nng.FIM(model, mine, nng.PMatKFAC, **options).to_dense()
    cuts.close(many, nng.FIM(case.model, case.loader, nng.PMatKFAC).to_dense(), 1e-9)
    assert in_parts(model)


# -- faults ------------------------------------------------------------------------------------------------------------


@check(CHECKS)
def one_raises_in_the_middle_and_all_do(here: Here) -> None:
    """In the forward pass of its second batch, in its backward pass, in its loader; afterwards the group measures."""
    case = cuts.data("transformer")
    model = sharded(case, here)
    last, batches = here.rank == here.size - 1, [case.loader[j % len(case.loader)] for j in range(3)]
    calls = [0]

    def forward(*batch: Any) -> torch.Tensor:
        calls[0] += 1
        out = model(*batch[:-1])
        if last and calls[0] > 2:
            raise ValueError("broken forward")
        return out

    def backward(*batch: Any) -> torch.Tensor:
        out = model(*batch[:-1])
        if last and out.requires_grad:
            out.register_hook(functools.partial(fail, "broken backward"))
        return out

    def loader() -> Any:
        yield batches[0]
        if last:
            raise ValueError("broken loader")
        yield from batches[1:]

    options = {"process_group": here.group, "memory_budget": short_of(case.model)}
    kind = ValueError if last else nng.PeerError
    for text, data, function in (
        ("broken forward", batches, forward),
        ("broken backward", batches, backward),
        ("broken loader", loader(), None),
    ):
        raises(kind, text, lambda d=data, f=function: nng.FIM(model, d, nng.PMatKFAC, function=f, **options))
        assert in_parts(model)
    in_turn(here, case, model, lambda m, d, **o: nng.FIM(m, d, nng.PMatDiag, **o).to_dense())


def fail(text: str, g: torch.Tensor) -> None:
    raise ValueError(text)


@check(CHECKS)
def numbers_that_are_not_finite_are_named(here: Here) -> None:
    case = cuts.data("mlp")
    model, mine = sharded(case, here), copy.deepcopy(cuts.mine(case.loader, here.rank, here.size))
    if here.rank == 0:
        mine[0][0][1, 0] = float("nan")
    kind = nng.PeerError if here.rank else nng.NonFiniteError
    options = {"process_group": here.group, "memory_budget": short_of(case.model)}
    raises(kind, "for examples [1]", lambda: nng.FIM(model, mine, nng.PMatKFAC, **options))
    assert in_parts(model)


@check(CHECKS)
def what_needs_all_parameters_says_so(here: Here) -> None:
    """It gathers them, with a warning; so do models that are parallel in another way too."""
    case = cuts.data("mlp")
    model, mine = sharded(case, here), cuts.mine(case.loader, here.rank, here.size)
    options = {"process_group": here.group, "memory_budget": short_of(case.model)}
    for measure in (
        lambda m, d, **o: nng.Hessian(m, d, nng.PMatDiag, loss="cross_entropy", **o).to_dense(),
        lambda m, d, **o: nng.FIM(m, d, nng.PMatImplicit, **o).diag().tensor,
        lambda m, d, **o: nng.GramMatrix(m, d, nng.FMatDiag, **o).diag().tensor,
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = measure(model, mine, **options)
        told = [str(w.message) for w in said if issubclass(w.category, nng.MemoryWarning)]
        assert any("is gathered for this measure" in text for text in told), told
        cuts.close(found, measure(case.model, case.loader), 1e-9)
    assert in_parts(model)


@check(CHECKS)
def training_goes_on(here: Here) -> None:
    case = cuts.data("mlp")
    data = cuts.mine(case.loader, here.rank, here.size) or case.loader[:1]
    models = [sharded(case, here) for _ in range(2)]
    for step in range(3):
        for model in models:
            opt = torch.optim.SGD(model.parameters(), lr=0.1)
            if step == 1:  # between a forward and a backward pass too
                loss = nn.functional.cross_entropy(model(data[0][0]), data[0][1])
            if model is models[0]:
                options = {"process_group": here.group, "memory_budget": short_of(case.model)}
                nng.FIM(model, data, nng.PMatKFAC, **options)
            if step != 1:
                loss = nn.functional.cross_entropy(model(data[0][0]), data[0][1])
            loss.backward()
            opt.step()
            opt.zero_grad()
    for p, q in zip(*(m.parameters() for m in models)):
        assert torch.equal(p.full_tensor(), q.full_tensor())
    dist.barrier()
