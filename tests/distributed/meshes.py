"""Models cut in two ways over four processes: ``fully_shard`` with tensor parallelism, or along two axes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import cuts
import torch
from cases import representation
from fully_sharded import hooks
from launch import Check, Here, check, raises
from tensor_parallel import LABELS, PLAN, TOKENS, Block
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import KFAC

CHECKS: dict[str, Check] = {}
PARTS = [[(TOKENS[:6], LABELS[:6])], [(TOKENS[6:8], LABELS[6:8]), (TOKENS[8:], LABELS[8:])]]
ALL = [(TOKENS, LABELS)]


def whole() -> nn.Module:
    """The model that is cut."""
    torch.manual_seed(4)
    return Block().double()


def crossed(kind: str) -> None:
    def f(here: Here) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = whole()
        other = parallelize_module(copy.deepcopy(model), mesh["tp"], PLAN)
        for m in (other.up, other):
            fully_shard(m, mesh=mesh["dp"])
        before, mine = hooks(other), PARTS[here.rank // 2]
        one = nng.FIM(model, ALL, representation(kind, model)).to_dense()
        many = nng.FIM(other, mine, representation(kind, other), process_group=mesh["dp"]).to_dense()
        cuts.close(many, one, 1e-10 if kind == "ekfac" else 1e-12)
        here.same(many)
        assert hooks(other) == before and all(p.grad is None for p in other.parameters())
        if kind == "diag":  # what is cut in two ways is gathered, also where it does not fit
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                options = {"process_group": mesh["dp"], "memory_budget": 100}
                cuts.close(nng.FIM(other, mine, representation(kind, other), **options).to_dense(), one)
            assert any("is gathered for this measure" in str(w.message) for w in said)

    CHECKS[f"fully_shard and tensor-parallel {kind}"] = f


for kind in ("dense", "diag", "kfac", "ekfac", "mixed"):
    crossed(kind)


@check(CHECKS)
def examples_are_split_over_one_axis_only(here: Here) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    other = fully_shard(parallelize_module(whole(), mesh["tp"], PLAN), mesh=mesh["dp"])
    mine = PARTS[here.rank // 2]
    text = "not in process_group"
    raises(nng.ArgumentError, text, lambda: nng.FIM(other, mine, nng.PMatDiag, process_group=mesh["tp"]))
    text = "different batches"
    raises(nng.RankMismatchError, text, lambda: nng.FIM(other, PARTS[here.rank % 2], process_group=mesh["dp"]))


def hybrid(kind: str, **options: Any) -> None:
    def f(here: Here) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        model = whole()
        other = fully_shard(copy.deepcopy(model), mesh=mesh)
        mine = [(TOKENS[here.rank :: 4], LABELS[here.rank :: 4])]
        order = torch.cat([torch.arange(9)[rank::4] for rank in range(4)])
        one = nng.FIM(model, (TOKENS[order], LABELS[order]), representation(kind, model)).to_dense()
        many = nng.FIM(other, mine, representation(kind, other), process_group=here.group, **options).to_dense()
        cuts.close(many, one, 1e-10 if kind == "ekfac" else 1e-12)
        here.same(many)
        assert all(hasattr(p, "placements") for p in other.parameters())

    CHECKS[f"hybrid {kind}{' in turn' if options else ''}"] = f


for kind in ("dense", "kfac", "ekfac"):
    hybrid(kind)
    hybrid(kind, memory_budget=100)


@check(CHECKS)
def a_hybrid_needs_all_its_ranks(here: Here) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    other = fully_shard(whole(), mesh=mesh)
    raises(nng.ArgumentError, "flattened mesh", lambda: nng.FIM(other, ALL, process_group=mesh["shard"]))
    raises(nng.ArgumentTypeError, "2 axes", lambda: nng.FIM(other, ALL, process_group=mesh))
    flat = mesh._flatten()
    assert nng.FIM(other, ALL, nng.PMatDiag, process_group=flat).examples == 36


@check(CHECKS)
def training_a_hybrid(here: Here) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = whole()
    other = fully_shard(copy.deepcopy(model), mesh=mesh)
    tokens, labels = torch.cat([TOKENS, TOKENS.flip(0)])[:16], torch.arange(16) % 3
    options = {"lr": 0.05, "inverse_every": 1, "statistics_every": 1}
    one, many = KFAC(model, **options), KFAC(other, process_group=here.group, **options)
    mine = slice(4 * here.rank, 4 * here.rank + 4)
    for _ in range(3):
        for m, opt, part in ((model, one, slice(0, 16)), (other, many, mine)):
            opt.zero_grad()
            with opt.observe():
                F.cross_entropy(m(tokens[part]), labels[part]).backward()
            opt.step()
    trained = torch.cat([p.full_tensor().detach().flatten() for p in other.parameters()])
    here.same(trained)
    cuts.close(trained, torch.cat([p.detach().flatten() for p in model.parameters()]), 1e-9)


@check(CHECKS)
def training_of_parts_of_parts_is_refused(here: Here) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    other = fully_shard(parallelize_module(whole(), mesh["tp"], PLAN), mesh=mesh["dp"])
    raises(nng.UnsupportedError, "spread over processes", lambda: KFAC(other, process_group=mesh["dp"]))
