"""Optimizers of models under ``fully_shard``: the steps of one process on the joint batch, in parts."""

from __future__ import annotations

import copy
import dataclasses

import cuts
import torch
from fully_sharded import hooks, sharded
from launch import Check, Here, check, raises
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F
from training import EACH, MAKERS, batches, part, train

import nngeom as nng
from nngeom.optim import KFAC, LevenbergMarquardt, WinsorizedSGD

CHECKS: dict[str, Check] = {}


def whole(model: nn.Module) -> torch.Tensor:
    """The parameters, all of them."""
    assert all(hasattr(p, "placements") for p in model.parameters())
    return torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()])


def steps(here: Here, kind: str, name: str = "mlp", *, by_child: bool = True, **how) -> None:
    sizes = [EACH] * here.size
    model, joint = batches(name, sum(sizes))
    case = dataclasses.replace(cuts.data(name), model=model)
    other = sharded(case, here, by_child=by_child).train()
    before = hooks(other)
    one = train(model, make(kind, None)(model), joint, **how)
    opt = make(kind, here.group)(other)
    train_parts(other, opt, [part(b, here, sizes) for b in joint], **how)
    many = whole(other)
    here.same(many)
    cuts.close(many, one, 1e-9)
    assert hooks(other) == before


def make(kind: str, group: object):
    options = {} if group is None else {"process_group": group}
    return lambda m: MAKERS[kind](m, **options)


def train_parts(model: nn.Module, opt, data, *, passes: int = 1) -> None:
    """As ``train``, of parameters in parts."""
    for x, y in data:
        opt.zero_grad()
        with opt.observe():
            for xs, ys in zip(x.tensor_split(passes), y.tensor_split(passes)):
                (F.cross_entropy(model(xs), ys) / passes).backward()
        opt.step()


for kind in MAKERS:
    CHECKS[f"sharded {kind}"] = lambda here, k=kind: steps(here, k)
for kind in ("kfac", "ekfac batch"):
    CHECKS[f"sharded {kind}, convolutions"] = lambda here, k=kind: steps(here, k, "conv1d", by_child=False)
    CHECKS[f"sharded {kind}, accumulated"] = lambda here, k=kind: steps(here, k, passes=2)


@check(CHECKS)
def a_closure(here: Here) -> None:
    model, joint = batches("mlp", EACH * here.size)
    other = sharded(dataclasses.replace(cuts.data("mlp"), model=model), here).train()
    one = train(model, KFAC(model, lr=0.05, inverse_every=1, statistics_every=1), joint)
    opt = KFAC(other, lr=0.05, inverse_every=1, statistics_every=1, process_group=here.group)
    for x, y in (part(b, here, [EACH] * here.size) for b in joint):

        def closure(x=x, y=y) -> torch.Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(other(x), y)
            loss.backward()
            return loss

        opt.step(closure)
    cuts.close(whole(other), one, 1e-9)


@check(CHECKS)
def mixed_precision(here: Here) -> None:
    """Rows of weights that are cast, gradients of those that are kept: the step of single precision, roughly."""
    model, joint = batches("mlp", EACH * here.size)
    model, joint = model.float(), [(x.float(), y) for x, y in joint]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    other = fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (here.size,)), mp_policy=policy)
    options = {"lr": 0.05, "damping": 0.1, "inverse_every": 1, "statistics_every": 1}
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    one = train(model, KFAC(model, **options), joint)
    train_parts(
        other, KFAC(other, process_group=here.group, **options), [part(b, here, [EACH] * here.size) for b in joint]
    )
    many = whole(other)
    here.same(many)
    assert many.dtype == torch.float32 and float((many - one).norm()) < 0.05 * float((one - start).norm())


@check(CHECKS)
def settings_of_resharding_stay(here: Here) -> None:
    """How modules part after their passes is as it was: the root keeps its parameters, the others part."""
    model, joint = batches("mlp", EACH * here.size)
    other = sharded(dataclasses.replace(cuts.data("mlp"), model=model), here).train()
    opt = KFAC(other, lr=0.05, process_group=here.group)
    mine = [part(b, here, [EACH] * here.size) for b in joint]
    train_parts(other, opt, mine[:1])
    other(mine[0][0])
    assert hasattr(other[0].weight, "placements") and hasattr(other[2].weight, "placements")
    try:
        with opt.observe():
            raise KeyError
    except KeyError:
        pass
    opt.zero_grad()
    before = whole(other)
    train_parts(other, opt, mine[1:2])
    assert not torch.equal(whole(other), before)


@check(CHECKS)
def what_is_not_offered_of_sharded_models(here: Here) -> None:
    model = batches("mlp", 4)[0]
    case = dataclasses.replace(cuts.data("mlp"), model=model)
    other, group = sharded(case, here), here.group
    raises(nng.ArgumentError, "sharded over", lambda: KFAC(other))
    raises(nng.UnsupportedError, "automatic=True", lambda: KFAC(other, automatic=True, process_group=group))
    raises(nng.UnsupportedError, "fallback=", lambda: KFAC(other, fallback=True, process_group=group))
    rule = LevenbergMarquardt()
    raises(nng.UnsupportedError, "damping=", lambda: KFAC(other, damping=rule, process_group=group))
    opt = KFAC(other, process_group=group, fisher="exact", likelihood="categorical")
    raises(nng.UnsupportedError, "under fully_shard", lambda: opt.step(outputs=lambda: other(case.loader[0][0])))
    raises(nng.UnsupportedError, "spread over processes", lambda: WinsorizedSGD(other))
    mesh = init_device_mesh("cpu", (here.size,))
    cut = parallelize_module(copy.deepcopy(model), mesh, {"0": ColwiseParallel()})
    raises(nng.UnsupportedError, "spread over processes", lambda: KFAC(cut, process_group=group))
    single = init_device_mesh("cpu", (here.size, 1), mesh_dim_names=("a", "b"))["b"]
    own = fully_shard(copy.deepcopy(model), mesh=single)
    raises(nng.RankMismatchError, "over which its gradients", lambda: KFAC(own, process_group=group))
