"""Optimizers whose processes keep the curvature of layers of their own: the steps of those that all keep everything."""

from __future__ import annotations

import copy
import io

import cuts
import pytest
import torch
from launch import Check, Here, check
from sharded_training import train_parts, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import EACH, MAKERS, batches, parameters, part, train

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, SOAP, NaturalGradient, join_states, owners

CHECKS: dict[str, Check] = {}
ALL = {name: make for name, make in MAKERS.items() if name not in ("ekfac batch", "ekfac monte carlo", "mixed")}
ALL |= {
    "ekfac factors": lambda m, **k: EKFAC(m, lr=0.05, basis_every=2, scalings="factors", drowned=0.0, **k),
    "soap of rows": lambda m, **k: SOAP(m, lr=0.01, factors="rows", basis_every=2, statistics_every=1, **k),
    "soap": lambda m, **k: SOAP(m, lr=0.01, basis_every=2, **k),
    "block diagonal": lambda m, **k: NaturalGradient(m, nng.PMatBlockDiag, lr=0.05, damping=0.1, every=2, **k),
    "quasi-diagonal": lambda m, **k: NaturalGradient(m, nng.PMatQuasiDiag, lr=0.05, damping=1.0, **k),
    "eye": lambda m, **k: NaturalGradient(m, nng.PMatEye, lr=0.05, damping=0.1, **k),
    "rest": lambda m, **k: KFAC(m, lr=0.05, block_limit=2, inverse_every=2, statistics_every=2, **k),
    "relative": lambda m, **k: KFAC(m, lr=0.05, damping=nng.Relative(0.1), **k),
    "relative rest": lambda m, **k: KFAC(m, lr=0.05, damping=nng.Relative(0.1), block_limit=2, **k),
    "relative diagonal": lambda m, **k: NaturalGradient(m, nng.PMatDiag, lr=0.05, damping=nng.Relative(1.0), **k),
    "of kinds": lambda m, **k: NaturalGradient(
        m, nng.PMatMixed({"0.*": nng.PMatKFAC}, default=nng.PMatDense), lr=0.05, damping=1.0, **k
    ),
}
ROUNDED = ("dense", "block diagonal", "of kinds")  # inverses that are sent lie in memory in another order
MODELS = ("conv1d", "transformer", "tied", "embedding")


def replicas(model, here: Here, make, **options):
    """A replicated copy of a model, and its optimizer."""
    ddp = DistributedDataParallel(copy.deepcopy(model))
    return ddp, make(ddp, process_group=here.group, **options)


def keeps(opt) -> int:
    """Bytes of averages and blocks here."""
    tensors: list[torch.Tensor] = []

    def look(x) -> None:
        if isinstance(x, torch.Tensor):
            tensors.append(x)
        for y in x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ():
            look(y)

    look(opt.state_dict()["curvature"]["parts"])
    return sum(t.numel() * t.element_size() for t in tensors)


def as_replicated(here: Here, kind: str, name: str) -> None:
    """The same numbers; two processes add up in one order only."""
    model, joint = batches(name, EACH * here.size)
    mine = [part(b, here, [EACH] * here.size) for b in joint]
    ends = []
    for placement in ("replicated", "owned"):
        ddp, opt = replicas(model, here, ALL[kind], placement=placement)
        ends.append(train(ddp, opt, mine))
        here.same(ends[-1])
    cuts.close(ends[1], ends[0], 1e-9)
    assert here.size > 2 or kind in ROUNDED or torch.equal(ends[1], ends[0])


for kind in ALL:
    CHECKS[f"owned {kind}"] = lambda here, k=kind: as_replicated(here, k, "mlp")
for name in MODELS:
    for kind in ("kfac", "ekfac running", "relative rest"):
        CHECKS[f"owned {kind}, {name}"] = lambda here, k=kind, n=name: as_replicated(here, k, n)


@check(CHECKS)
def each_keeps_a_part(here: Here) -> None:
    """All of it once: nothing is kept twice, and nobody keeps all."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(2 * here.size))).double()
    mine = [(torch.randn(EACH, 6, dtype=torch.float64), torch.randint(0, 6, (EACH,))) for _ in range(2)]
    kept = []
    for placement in ("replicated", "owned"):
        ddp, opt = replicas(model, here, MAKERS["kfac"], placement=placement)
        train(ddp, opt, mine)
        kept.append(torch.tensor([keeps(opt)]))
    total = kept[1].clone()
    torch.distributed.all_reduce(total)
    assert torch.equal(total, kept[0]) and torch.equal(here.size * kept[1], kept[0]), (kept, total)


@check(CHECKS)
def resuming_with_another_placement(here: Here) -> None:
    """From processes that keep their own to one, to all, and to these again."""
    for kind in ("kfac", "ekfac running", "soap", "diag", "dense"):
        model, joint = batches("mlp", EACH * here.size)
        mine = [part(b, here, [EACH] * here.size) for b in joint]
        ddp, opt = replicas(model, here, ALL[kind], placement="owned")
        train(ddp, opt, mine[:3])
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        states: list = [None] * here.size
        torch.distributed.all_gather_object(states, file.getvalue())
        loaded = [torch.load(io.BytesIO(x), weights_only=True) for x in states]
        whole = join_states(loaded)
        middle = ddp.module
        later = {}
        for placement, state in (("replicated", whole), ("owned", whole), ("owned", loaded[here.rank])):
            other, again = replicas(middle, here, ALL[kind], placement=placement)
            again.load_state_dict(copy.deepcopy(state))
            later[placement, state is whole] = train(other, again, mine)
        alone = copy.deepcopy(middle)
        one = ALL[kind](alone)
        one.load_state_dict(copy.deepcopy(whole))
        back = copy.deepcopy(one.state_dict())
        there, from_one = replicas(middle, here, ALL[kind], placement="owned")
        from_one.load_state_dict(back)
        going = train(ddp, opt, mine)
        cuts.close(train(alone, one, joint), going, 1e-9)
        for end in (train(there, from_one, mine), *later.values()):
            cuts.close(end, going, 1e-9)
        if kind not in ("dense", "diag"):  # which one process keeps whole
            with pytest.raises(nng.ArgumentError, match=r"which another kept.*join_states"):
                ALL[kind](copy.deepcopy(middle)).load_state_dict(loaded[here.rank])
            with pytest.raises(nng.ArgumentError, match="in none of the 1 states"):
                join_states([loaded[here.rank]])


@check(CHECKS)
def decided_by_memory(here: Here) -> None:
    """``"auto"``: all keep everything where it fits, and layers of their own where one process has no room."""
    model, joint = batches("mlp", EACH * here.size)
    mine = [part(b, here, [EACH] * here.size) for b in joint]
    before = owners.memory_of
    try:
        ends = []
        for placement in ("replicated", "owned"):
            if placement == "owned" and here.rank == here.size - 1:
                owners.memory_of = lambda device: 1
            ddp, opt = replicas(model, here, MAKERS["kfac"], placement="auto")
            ends.append(train(ddp, opt, mine))
            assert opt.partition.owners.placement == placement
            here.same(ends[-1])
        cuts.close(ends[1], ends[0], 1e-9)
    finally:
        owners.memory_of = before
    _, opt = replicas(model, here, MAKERS["ekfac batch"], placement="auto")
    assert opt.partition.owners.placement == "replicated"


@check(CHECKS)
def a_singular_layer_of_one(here: Here) -> None:
    """What the process that keeps a layer raises, all leave out, and go on."""
    model, joint = batches("mlp", EACH * here.size)
    mine = [part(b, here, [EACH] * here.size) for b in joint]
    damped = lambda step: 0.0 if step == 1 else 0.1
    make = lambda m, **k: KFAC(m, lr=0.05, damping=damped, statistics_every=1, inverse_every=1, **k)
    ddp, opt = replicas(model, here, make, placement="owned")
    train(ddp, opt, mine[:1])
    before = parameters(ddp)
    opt.clock.numbers["statistics_decay"] = 0.0
    with pytest.warns(nng.optim.SkippedStepWarning):
        train(ddp, opt, [(x[:1], y[:1]) for x, y in mine[:1]])
    assert torch.equal(parameters(ddp), before) and opt.skipped == 1
    opt.clock.damping = 0.1
    here.same(train(ddp, opt, mine))
    assert opt.skipped == 1 and not torch.equal(parameters(ddp), before)


@check(CHECKS)
def under_fully_shard(here: Here) -> None:
    model, joint = batches("mlp", EACH * here.size)
    mine = [part(b, here, [EACH] * here.size) for b in joint]
    ends = []
    for placement in ("replicated", "owned"):
        other = copy.deepcopy(model)
        mesh = init_device_mesh("cpu", (here.size,))
        for layer in (*(m for m in other if list(m.parameters())), other):
            fully_shard(layer, mesh=mesh)
        train_parts(other, MAKERS["ekfac running"](other, process_group=here.group, placement=placement), mine)
        ends.append(whole(other))
    cuts.close(ends[1], ends[0], 1e-9)


@check(CHECKS)
def what_is_not_owned(here: Here) -> None:
    model = batches("mlp", 4)[0]
    ddp, group = DistributedDataParallel(model), here.group
    with pytest.raises(nng.ArgumentError, match="placement is 'mine'; expected 'replicated'"):
        KFAC(ddp, process_group=group, placement="mine")
    for options, text in (
        ({"scalings": "batch"}, "second moments of examples"),
        ({"fisher": "exact", "likelihood": "categorical"}, "second moments of examples"),
        ({"rest": nng.PMatKFAC.options(fit="nearest")}, "sweeps, which need"),
    ):
        with pytest.raises(nng.UnsupportedError, match=text):
            EKFAC(ddp, process_group=group, placement="owned", **options)
    with pytest.raises(nng.RankMismatchError, match="placement is"):
        KFAC(ddp, process_group=group, placement="owned" if here.rank else "replicated")
    ddp, opt = replicas(model, here, EKFAC, placement="owned", damping=nng.Cutoff(1e-3, top=3))
    x, y = batches("mlp", EACH)[1][0]
    with pytest.raises(nng.UnsupportedError, match="eigenvalues that several processes keep"):
        train(ddp, opt, [(x, y)])
    with pytest.raises(nng.ArgumentError, match="states is empty"):
        join_states([])
