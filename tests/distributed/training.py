"""Optimizers of a replicated model: the steps of one process on the joint batch, and replicas equal bit by bit."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import cuts
import pytest
import torch
from faults import OddOnce, coded
from launch import Check, Here, check
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, LevenbergMarquardt, NaturalGradient, WinsorizedSGD

CHECKS: dict[str, Check] = {}
STEPS, EACH = 4, 6  # examples of a rank in a step

MAKERS = {
    "kfac": lambda m, **k: KFAC(m, lr=0.05, inverse_every=2, statistics_every=1, **k),
    "kfac exact damping, clip": lambda m, **k: KFAC(m, lr=0.05, damping=0.1, weight_decay=0.01, kl_clip=1e-3, **k),
    "kfac reduce, balanced": lambda m, **k: KFAC(
        m, lr=0.05, sharing="reduce", damping=nng.FactoredTikhonov(1e-2), inverse_every=1, **k
    ),
    "kfac exact fisher": lambda m, **k: KFAC(
        m, lr=0.05, fisher="exact", likelihood="categorical", statistics_every=2, inverse_every=2, **k
    ),
    "ekfac batch": lambda m, **k: EKFAC(m, lr=0.05, basis_every=2, scalings="batch", statistics_every=1, **k),
    "ekfac running": lambda m, **k: EKFAC(m, lr=0.05, basis_every=3, statistics_every=1, **k),
    "ekfac monte carlo": lambda m, **k: EKFAC(
        m, lr=0.05, basis_every=2, fisher="monte_carlo", likelihood="categorical", scalings="batch", **k
    ),
    "diag": lambda m, **k: NaturalGradient(m, nng.PMatDiag, lr=0.05, damping=0.1, **k),
    "dense": lambda m, **k: NaturalGradient(m, nng.PMatDense, lr=0.05, damping=0.1, every=2, **k),
    "low rank": lambda m, **k: NaturalGradient(m, nng.PMatLowRank, lr=0.05, damping=0.1, statistics_decay=0.0, **k),
    "mixed": lambda m, **k: NaturalGradient(
        m, nng.PMatMixed({"0.*": nng.PMatEKFAC}, default=nng.PMatQuasiDiag), lr=0.05, damping=1.0, **k
    ),
}


def batches(name: str, count: int, seed: int = 0):
    """Joint batches of a case, one a step."""
    case = cuts.build(name, sizes=(count,) * STEPS)
    return case.model.train(), case.loader


def part(batch, here: Here, sizes: list[int]):
    """A rank's examples of a joint batch."""
    lo = sum(sizes[: here.rank])
    return tuple(t[lo : lo + sizes[here.rank]] for t in batch)


def train(model, opt, data, *, reduction="mean", passes=1, share=1.0, evaluate=False, lowest=False) -> torch.Tensor:
    """Steps; ``passes``: of accumulation; ``share``: of the gradient that is kept; ``lowest``: to the minimum of the
    quadratic model. The parameters at the end.
    """
    for x, y in data:
        opt.zero_grad()
        pieces = list(zip(x.tensor_split(passes), y.tensor_split(passes)))
        with opt.observe(reduction=reduction):
            for j, (xs, ys) in enumerate(pieces):
                last = j == len(pieces) - 1 or not isinstance(model, DistributedDataParallel)
                with nullcontext() if last else model.no_sync():
                    loss = F.cross_entropy(model(xs), ys, reduction=reduction)
                    (loss / passes if reduction == "mean" else loss).backward()
        for p in model.parameters():
            p.grad *= share
        judge = {"evaluate": lambda x=x, y=y: F.cross_entropy(model(x), y)} if evaluate else {}
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        opt.step(**judge, **({"outputs": lambda x=x, inner=inner: inner(x)} if lowest else {}))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def pair(here: Here, name: str, make, sizes: list[int] | None = None, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """The parameters of one process on joint batches, and of all on their parts."""
    sizes = sizes or [EACH] * here.size
    model, joint = batches(name, sum(sizes))
    other = copy.deepcopy(model)
    uneven = len(set(sizes)) > 1
    one = train(model, make(model), joint, share=1 / here.size if uneven else 1.0, **how)
    ddp = DistributedDataParallel(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error", nng.UnevenBatchWarning)
        many = train(ddp, make(ddp, process_group=here.group), [part(b, here, sizes) for b in joint], **how)
    here.same(many)
    return one, many


def equal(here: Here, kind: str, name: str = "mlp", **how) -> None:
    one, many = pair(here, name, MAKERS[kind], **how)
    cuts.close(many, one, 1e-9)


for kind in MAKERS:
    CHECKS[kind] = lambda here, k=kind: equal(here, k)
for kind in ("kfac", "ekfac batch"):
    CHECKS[f"{kind}, convolutions"] = lambda here, k=kind: equal(here, k, "conv1d")
for kind in ("kfac", "ekfac batch", "diag", "low rank"):
    CHECKS[f"{kind}, uneven"] = lambda here, k=kind: equal(here, k, sizes=[7, 5, 6, 4][: here.size], reduction="sum")


@check(CHECKS)
def accumulation(here: Here) -> None:
    for kind in ("kfac", "ekfac running"):
        one, many = pair(here, "mlp", MAKERS[kind], passes=2)
        cuts.close(many, one, 1e-9)


@check(CHECKS)
def levenberg_marquardt(here: Here) -> None:
    make = lambda m, **k: KFAC(m, damping=LevenbergMarquardt(every=1), lr=0.1, inverse_every=1, **k)
    one, many = pair(here, "mlp", make, evaluate=True)
    cuts.close(many, one, 1e-9)


@check(CHECKS)
def steps_to_the_minimum_of_the_quadratic_model(here: Here) -> None:
    own = {"fisher": "exact", "likelihood": "categorical"}
    make = lambda m, **k: KFAC(m, damping=LevenbergMarquardt(every=1), inverse_every=1, **own, **k)
    one, many = pair(here, "mlp", make, evaluate=True, lowest=True)
    cuts.close(many, one, 1e-9)


@check(CHECKS)
def token_mean(here: Here) -> None:
    """A loss averaged over the positions of all examples."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(2 * here.size, 5, 4, dtype=torch.float64), torch.randint(0, 3, (2 * here.size, 5))
    found = []
    for ddp in (False, True):
        inner = copy.deepcopy(model)
        wrapped = DistributedDataParallel(inner) if ddp else inner
        options = {"process_group": here.group} if ddp else {}
        opt = KFAC(wrapped, lr=0.1, reduction="token_mean", inverse_every=1, **options)
        xs, ys = part((x, y), here, [2] * here.size) if ddp else (x, y)
        for _ in range(3):
            opt.zero_grad()
            with opt.observe():
                F.cross_entropy(wrapped(xs).flatten(0, 1), ys.flatten()).backward()
            opt.step()
        found.append(torch.cat([p.detach().flatten() for p in inner.parameters()]))
    cuts.close(found[1], found[0], 1e-9)


@check(CHECKS)
def one_row_a_batch(here: Here) -> None:
    """Recurrent cells: the squares are those of as many passes as there are processes; replicas stay equal."""
    model, joint = batches("gru", EACH * here.size)
    ddp = DistributedDataParallel(model)
    opt = KFAC(ddp, lr=0.01, process_group=here.group)
    here.same(train(ddp, opt, [part(b, here, [EACH] * here.size) for b in joint]))


@check(CHECKS)
def resuming_at_another_size(here: Here) -> None:
    """The state of all goes on in one process, and that of one in all."""
    for kind in ("kfac", "ekfac batch", "ekfac monte carlo"):
        make, group = MAKERS[kind], here.group
        model, joint = batches("mlp", EACH * here.size)
        mine = [part(b, here, [EACH] * here.size) for b in joint]
        ddp = DistributedDataParallel(copy.deepcopy(model))
        opt = make(ddp, process_group=group)
        train(ddp, opt, mine)
        alone = copy.deepcopy(ddp.module)
        later = make(alone)
        later.load_state_dict(copy.deepcopy(opt.state_dict()))
        back = DistributedDataParallel(copy.deepcopy(alone))
        again = make(back, process_group=group)
        again.load_state_dict(copy.deepcopy(later.state_dict()))
        going = train(ddp, opt, mine)
        cuts.close(train(alone, later, joint), going, 1e-9)
        resumed = train(back, again, mine)  # the order in which DDP itself adds up changes after its first step
        assert torch.equal(resumed, going) if here.size == 2 else cuts.close(resumed, going) is None


def small(here: Here, **options):
    """A replicated model, its optimizer and this rank's batch."""
    model, joint = batches("mlp", EACH * here.size)
    ddp = DistributedDataParallel(model)
    return ddp, KFAC(ddp, lr=0.05, process_group=here.group, **options), part(joint[0], here, [EACH] * here.size)


def parameters(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@check(CHECKS)
def a_step_that_is_left_out(here: Here) -> None:
    """Statistics that are not finite on one rank: no rank takes the step."""
    ddp, opt, (x, y) = small(here, statistics_every=1, inverse_every=1)
    train(ddp, opt, [(x, y)])
    before = parameters(ddp)
    opt.zero_grad()
    with opt.observe():
        F.cross_entropy(ddp(x), y).backward()
    if here.rank == 1:
        next(iter(next(iter(opt.partition)).pending.sums.values()))["g"].fill_(torch.inf)
    with pytest.warns(nng.optim.SkippedStepWarning, match="on rank 1 of"):
        opt.step()
    assert torch.equal(parameters(ddp), before) and opt.skipped == 1
    here.same(train(ddp, opt, [(x, y)]))


@check(CHECKS)
def a_singular_matrix(here: Here) -> None:
    """What the rank that inverts it finds, all leave out; at the first step all raise."""
    ddp, opt, (x, y) = small(here, damping=0.0, statistics_every=1, inverse_every=1)
    opt.zero_grad()
    with opt.observe():
        F.cross_entropy(ddp(x[:1]), y[:1]).backward()
    with pytest.raises((nng.SingularError, nng.PeerError)):
        opt.step()
    ddp, opt, (x, y) = small(here, damping=lambda t: 0.1 if t == 0 else 0.0, statistics_every=1, inverse_every=1)
    opt.clock.numbers["statistics_decay"] = 0.0
    train(ddp, opt, [(x, y)])
    before = parameters(ddp)
    opt.zero_grad()
    with opt.observe():
        F.cross_entropy(ddp(x[:1]), y[:1]).backward()
    with pytest.warns(nng.optim.SkippedStepWarning):
        opt.step()
    assert torch.equal(parameters(ddp), before)


@check(CHECKS)
def what_differs(here: Here) -> None:
    """Numbers of the schedule, batches without examples, models, groups."""
    ddp, opt, (x, y) = small(here, damping=lambda t: 0.1 + (here.rank == 1))
    opt.zero_grad()
    with opt.observe():
        F.cross_entropy(ddp(x), y).backward()
    with pytest.raises(nng.RankMismatchError, match="schedule is"):
        opt.step()
    ddp, opt, (x, y) = small(here)
    with opt.observe() if here.rank != 1 else nullcontext():
        F.cross_entropy(ddp(x), y).backward()
    with pytest.raises(nng.RankMismatchError, match=r"rank 1 of .* observed no example"):
        opt.step()
    inner = copy.deepcopy(ddp.module)
    with torch.no_grad():
        inner[0].bias[0] += here.rank
    with pytest.raises(nng.RankMismatchError, match=r"the digest of parameter '0\.bias'"):
        KFAC(inner, process_group=here.group)
    with pytest.raises(nng.RankMismatchError, match="representation is"):
        KFAC(ddp, sharing="reduce" if here.rank == 1 else "expand", process_group=here.group)
    for make in (KFAC, EKFAC, NaturalGradient, WinsorizedSGD):
        with pytest.raises(nng.UnsupportedError, match=f"{here.size} processes.*process_group=model.process_group"):
            make(ddp)
    with pytest.raises(nng.ArgumentError, match="async_basis"):
        EKFAC(ddp, async_basis=True, process_group=here.group)
    alone = [torch.distributed.new_group([r]) for r in range(here.size)][here.rank]
    with pytest.raises(nng.UnsupportedError, match="replicated over"):
        KFAC(ddp, process_group=alone)


@check(CHECKS)
def uneven_batches(here: Here) -> None:
    ddp, opt, (x, y) = small(here)
    opt.zero_grad()
    with opt.observe():
        F.cross_entropy(ddp(x[: 3 + here.rank]), y[: 3 + here.rank]).backward()
    with pytest.warns(nng.UnevenBatchWarning, match=f"saw 3 to {2 + here.size} examples"):
        opt.step()


@check(CHECKS)
def winsorized(here: Here) -> None:
    """The examples of all processes are one set."""
    for name in ("mlp", "conv1d", "tied"):
        one, many = pair(here, name, lambda m, **k: Steps(WinsorizedSGD(m, lr=0.1, level=20.0, momentum=0.5, **k)))
        cuts.close(many, one, 1e-9)
    ddp, _, (x, y) = small(here)
    opt = WinsorizedSGD(ddp, lr=0.1, process_group=here.group)
    with opt.observe():
        F.cross_entropy(ddp(x[: 3 + here.rank]), y[: 3 + here.rank]).backward()
    with pytest.warns(nng.UnevenBatchWarning, match=f"saw 3 to {2 + here.size} examples"):
        opt.step()
    here.same(parameters(ddp))
    opt.zero_grad()
    with opt.observe() if here.rank != 1 else nullcontext():
        F.cross_entropy(ddp(x), y).backward()
    with pytest.raises(nng.RankMismatchError, match=r"rank 1 of .* observed no example"):
        opt.step()
    with pytest.raises(nng.RankMismatchError, match="level is"):
        WinsorizedSGD(ddp, level=10.0 + here.rank, process_group=here.group)


class Steps:
    """An optimizer that needs no word on the reduction of losses."""

    def __init__(self, opt) -> None:
        self.opt, self.step, self.zero_grad = opt, opt.step, opt.zero_grad

    def observe(self, reduction: str):
        return self.opt.observe()


@check(CHECKS)
def a_layer_used_oddly_on_one_rank(here: Here) -> None:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(OddOnce().double())
    opt = KFAC(ddp, lr=0.05, statistics_every=1, process_group=here.group)
    data = [coded(7 if here.rank == 1 else 0)] * 3
    with pytest.warns(nng.optim.SkippedStepWarning, match="used parameters differently"):
        train(ddp, opt, data[:1])
    before = parameters(ddp)
    after = train(ddp, opt, data)
    assert opt.skipped == 1 and not torch.equal(before, after)
    here.same(after)
