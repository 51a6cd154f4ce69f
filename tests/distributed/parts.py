"""Models whose parameters lie in parts on several processes: the numbers of the whole model on all data."""

from __future__ import annotations

import copy
from collections.abc import Callable

import cuts
from cases import STORED, Case, representation
from launch import Check, Here
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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
