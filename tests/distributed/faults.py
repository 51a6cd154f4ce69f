"""What goes wrong on one process: all say so, soon, in one sentence, and the group measures again."""

from __future__ import annotations

import contextlib
import time
import warnings

import cuts
import pytest
import torch
import torch.distributed as dist
from launch import Check, Here, check
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import nngeom as nng
from nngeom.ranks.team import ALONE, Team

CHECKS: dict[str, Check] = {}


def again(here: Here) -> None:
    """The group still measures rightly."""
    case = cuts.data("mlp")
    many = nng.FIM(case.model, cuts.mine(case.loader, here.rank, here.size), nng.PMatDiag, process_group=here.group)
    cuts.close(many.trace(), nng.FIM(case.model, case.loader, nng.PMatDiag).trace())


def own(here: Here, name: str = "mlp"):
    """A model, and this rank's batch."""
    case = cuts.data(name)
    return case.model, [case.loader[here.rank]]


def raised(here: Here, call, mine: type, theirs: str, others: type = nng.PeerError) -> Exception:
    """Rank 1 raises ``mine``, all others say ``theirs``."""
    with pytest.raises(mine if here.rank == 1 else others) as caught:
        call()
    if here.rank != 1:
        assert theirs in str(caught.value), str(caught.value)
    again(here)
    return caught.value


@check(CHECKS)
def a_loader_that_raises(here: Here) -> None:
    model, batches = own(here)

    def broken():
        yield batches[0]
        raise ValueError("broken file shard-1.tar")

    data = list(batches) if here.rank != 1 else broken()
    for kind in (nng.PMatKFAC, nng.PMatEKFAC, nng.PMatImplicit):
        said = f"rank 1 of {here.size} raised ValueError: broken file"
        data = list(batches) if here.rank != 1 else broken()
        error = raised(here, lambda r=kind, d=data: nng.FIM(model, d, r, process_group=here.group), ValueError, said)
        if here.rank != 1:
            assert (error.rank, error.kind) == (1, "ValueError")


@check(CHECKS)
def an_interrupt(here: Here) -> None:
    model, batches = own(here)
    function = (lambda x, y: model(x)) if here.rank != 1 else (lambda x, y: (_ for _ in ()).throw(KeyboardInterrupt()))
    call = lambda: nng.FIM(model, batches, function=function, process_group=here.group)
    raised(here, call, KeyboardInterrupt, "raised KeyboardInterrupt")


@check(CHECKS)
def numbers_that_are_not_finite(here: Here) -> None:
    model, batches = own(here)
    if here.rank == 1:
        batches = [(torch.full_like(x, torch.nan), y) for x, y in batches]
    for kind in (nng.PMatKFAC, nng.PMatImplicit):
        call = lambda r=kind: nng.FIM(model, batches, r, process_group=here.group)
        raised(here, call, nng.NonFiniteError, "raised NonFiniteError: outputs of batch 0")


@check(CHECKS)
def a_failure_is_known_before_the_end(here: Here) -> None:
    model, _ = own(here)
    failing, seen = here.folder / "failing", 0

    def slow():  # far from its end when the other process has failed, whichever is the faster one
        nonlocal seen
        while not failing.exists():
            time.sleep(0.01)
        while seen < 400:
            seen += 1
            time.sleep(0.05)
            yield cuts.data("mlp").loader[0]

    def broken():
        failing.touch()
        raise ValueError("a bad first batch")
        yield

    call = lambda: nng.FIM(model, broken() if here.rank == 1 else slow(), nng.PMatDiag, process_group=here.group)
    raised(here, call, ValueError, "a bad first batch")
    assert seen < 400, "all batches were read"


@check(CHECKS)
def other_models(here: Here) -> None:
    case = cuts.data("mlp")
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(nng.RankMismatchError, match=r"parameter '0.weight' is \(5, 4\).* on rank.* 0.*\(6, 4\).* on"):
        nng.FIM(case.model if here.rank != 1 else other, case.loader, process_group=here.group)
    again(here)


@check(CHECKS)
def other_weights(here: Here) -> None:
    model, batches = own(here, "batch-norm")
    sums = [p for p in model.parameters()][1], model[1].running_mean
    for t, name in zip(sums, ("parameter '0.bias'", "buffer '1.running_mean'")):
        held = t.detach().clone()
        with torch.no_grad():
            t[0] += 1e-15 * (here.rank == 1) + t[0].abs() * 1e-15 * (here.rank == 1)
        for measure, options in ((nng.FIM, {}), (nng.Hessian, {"loss": "cross_entropy"})):
            with pytest.raises(nng.RankMismatchError, match=f"the digest of {name}"):
                measure(model, batches, nng.PMatDense, **options, process_group=here.group)
        with torch.no_grad():
            t.copy_(held)
    nng.FIM(model, batches, nng.PMatDense, process_group=here.group)


@check(CHECKS)
def other_settings(here: Here) -> None:
    model, batches = own(here)
    odd = here.rank == 1
    calls = {
        "representation": lambda: nng.FIM(model, batches, nng.PMatDiag if odd else nng.PMatKFAC, **group),
        "options": lambda: nng.FIM(model, batches, nng.PMatKFAC, sharing="reduce" if odd else "expand", **group),
        "metric": lambda: nng.FIM_MonteCarlo(model, batches, nng.PMatDiag, samples=1 + odd, **group),
        "selected parameters": lambda: nng.FIM(model, batches, nng.PMatDiag, layer_collection=part, **group),
    }
    group = {"process_group": here.group}
    part = nng.LayerCollection.from_model(model, exclude="0.bias") if odd else None
    for name, call in calls.items():
        with pytest.raises(nng.RankMismatchError, match=f"{name} is "):
            call()
    loss = "mse" if odd else lambda f, y: f.square().sum(1)
    with pytest.raises(nng.RankMismatchError, match="metric is "):
        nng.GradientCovariance(model, batches, loss=loss, **group)
    again(here)


@check(CHECKS)
def other_calls(here: Here) -> None:
    model, batches = own(here)
    with pytest.raises(nng.RankMismatchError, match=r"not in the same call: call is FIM on rank.*Hessian on rank 1"):
        if here.rank == 1:
            nng.Hessian(model, batches, loss="cross_entropy", process_group=here.group)
        else:
            nng.FIM(model, batches, process_group=here.group)
    again(here)


@check(CHECKS)
def no_examples(here: Here) -> None:
    model, _ = own(here)
    with pytest.raises(nng.LoaderError, match="no example was seen"):
        nng.FIM(model, [], nng.PMatDiag, process_group=here.group)
    for call in (
        lambda: nng.FIM(model, [], nng.PMatImplicit, process_group=here.group),
        lambda: nng.Hessian(model, [], nng.PMatDense, loss="cross_entropy", process_group=here.group),
        lambda: nng.GradientCovariance(model, [], loss="cross_entropy", process_group=here.group),
        lambda: nng.FIM(model, [], nng.PMatDiag, estimator="rademacher", process_group=here.group),
    ):
        with pytest.raises(nng.LoaderError, match="no example"):
            call()
    again(here)


@check(CHECKS)
def the_same_data(here: Here) -> None:
    case = cuts.data("mlp")
    for kind in (nng.PMatDiag, nng.PMatImplicit):
        with pytest.warns(nng.SameDataWarning, match="read the same first batch"):
            nng.FIM(case.model, case.loader, kind, process_group=here.group)
    data = TensorDataset(case.inputs[:13], case.targets[:13])
    loader = DataLoader(data, 3, sampler=DistributedSampler(data, here.size, here.rank, shuffle=False))
    with pytest.warns(nng.RepeatedExamplesWarning, match=rf"repeats {-13 % here.size} of 13"):
        nng.FIM(case.model, loader, nng.PMatDiag, process_group=here.group)


@check(CHECKS)
def shards(here: Here) -> None:
    case = cuts.data("mlp")
    for n in (0, 1, 5, case.n):
        part = nng.shard(range(n))
        counts = [None] * here.size
        dist.all_gather_object(counts, [part[j] for j in range(len(part))])
        assert [x for some in counts for x in some] == list(range(n)) and max(map(len, counts)) - min(
            map(len, counts)
        ) <= 1
    data = TensorDataset(case.inputs, case.targets)
    loader = DataLoader(nng.shard(data, here.group), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many = nng.FIM(case.model, loader, process_group=init_device_mesh("cpu", (here.size,))).to_dense()
    cuts.close(many, nng.FIM(case.model, case.loader).to_dense())


@check(CHECKS)
def numbers_of_examples(here: Here) -> None:
    """Strided over ranks as samplers do: draws follow the examples' own numbers."""
    case = cuts.data("mlp")
    x, y, ids = case.inputs, case.targets, torch.arange(case.n)
    whole = [(x, y, ids)]
    part = [(x[s], y[s], ids[s]) for s in (slice(here.rank, None, here.size),)]
    options = {"function": lambda x, y, ids: case.model(x), "index": lambda batch: batch[2]}
    for measure in (
        lambda data, **o: nng.FIM_MonteCarlo(case.model, data, nng.PMatDense, generator=torch.Generator(), **o),
        lambda data, **o: (
            nng.FIM(
                case.model, data, nng.PMatDense, estimator="rademacher", samples=3, generator=torch.Generator(), **o
            ).matrix
        ),
        lambda data, **o: nng.FIM_MonteCarlo(case.model, data, nng.PMatImplicit, generator=torch.Generator(), **o),
    ):
        one, many = measure(whole, **options), measure(part, **options, process_group=here.group)
        cuts.close(many.to_dense(), one.to_dense(), 1e-11)
        cuts.close(one.to_dense(), measure([(x, y)]).to_dense(), 1e-11)


@check(CHECKS)
def groups_within(here: Here) -> None:
    """A process outside of a group; a group of one; parts of a larger world."""
    model, batches = own(here)
    case = cuts.data("mlp")
    alone = [dist.new_group([r]) for r in range(here.size)]
    mine, other = alone[here.rank], alone[(here.rank + 1) % here.size]
    assert Team.of(mine) is ALONE and Team.of(None) is ALONE
    one = nng.FIM(case.model, case.loader, nng.PMatEKFAC)
    same = nng.FIM(case.model, case.loader, nng.PMatEKFAC, process_group=mine)
    assert torch.equal(one.to_dense(), same.to_dense())
    with pytest.raises(nng.ArgumentError, match="is not in the process group"):
        nng.FIM(model, batches, process_group=other)
    for bad in (True, "world", object(), init_device_mesh("cpu", (1, here.size))):
        with pytest.raises(nng.ArgumentTypeError, match="ProcessGroup, a 1-D DeviceMesh"):
            nng.FIM(model, batches, process_group=bad)
    again(here)


class OddOnce(nn.Module):
    """Its first layer is used in a way that no adapter knows where the inputs ask for it, or not at all."""

    def __init__(self):
        super().__init__()
        self.first, self.side, self.last = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        code = int(x[0, 0].round())
        if code == 7:
            h = torch.tanh(x @ self.first.weight.t().clone() + self.first.bias) + self.side(x)
        elif code == 8:
            h = torch.tanh(self.first(x))
        elif code == 9:
            h = self.side(x) + torch.tanh(self.first(x))
        else:
            h = torch.tanh(self.first(x)) + self.side(x)
        return self.last(h)


def coded(code: float, n: int = 4):
    """Inputs that say how the layers are used."""
    torch.manual_seed(int(code))
    x = torch.randn(n, 4, dtype=torch.float64)
    x[:, 0] = code
    return x, torch.arange(n) % 3


@check(CHECKS)
def structure_that_differs(here: Here) -> None:
    """On rank 1 a layer is used oddly, not at all, or is met in another order."""
    torch.manual_seed(0)
    model = OddOnce().double()
    for code in (7, 8, 9):
        whole = [coded(code if rank == 1 else 0) for rank in range(here.size)]
        for kind in (nng.PMatDense, nng.PMatDiag, nng.PMatBlockDiag, nng.PMatLowRank):
            one = nng.FIM(model, whole, kind).to_dense()
            many = nng.FIM(model, whole[here.rank : here.rank + 1], kind, process_group=here.group).to_dense()
            cuts.close(many, one)
            here.same(many)
        for kind in (nng.PMatKFAC, nng.PMatEKFAC):
            many = nng.FIM(model, whole[here.rank : here.rank + 1], kind, process_group=here.group)
            here.same(many.to_dense())
            if code != 7:
                cuts.close(many.to_dense(), nng.FIM(model, whole, kind).to_dense(), 1e-11)
                continue
            exact = nng.FIM(model, whole, nng.PMatDense).to_dense()  # what is used oddly is kept whole, on all ranks
            place = slice(0, 12)
            cuts.close(many.to_dense()[place, place], exact[place, place], 1e-11)


@contextlib.contextmanager
def recorded():
    """The collectives of what happens inside: their names, numbers and dtypes."""
    calls, real = [], {name: getattr(dist, name) for name in ("all_gather", "all_reduce", "broadcast")}

    def record(name):
        def call(first, *rest, **options):
            t = rest[0] if name == "all_gather" else first
            calls.append((name, t.numel(), str(t.dtype)))
            return real[name](first, *rest, **options)

        return call

    try:
        for name in real:
            setattr(dist, name, record(name))
        yield calls
    finally:
        for name, f in real.items():
            setattr(dist, name, f)


@check(CHECKS)
def collectives_are_few_and_the_same(here: Here) -> None:
    """None inside a sweep, however many batches; one reduction of all sums after it; the same calls on all ranks."""
    model, batches = own(here)
    d = sum(p.numel() for p in model.parameters())
    sums = {nng.PMatDiag: d, nng.PMatDense: d * d, nng.PMatKFAC: 5**2 + 5**2 + 6**2 + 3**2}
    for kind, numbers in sums.items():
        for times in (1, 5):
            with recorded() as calls:
                nng.FIM(model, batches * (times if here.rank else 1), kind, process_group=here.group)
            small = [c for c in calls if c[0] == "all_gather"]
            assert {c[1] for c in small} == {1024} and len(small) == 5, small
            assert [c for c in calls if c not in small] == [("all_reduce", numbers, "torch.float64")], calls
            everyone = [None] * here.size
            dist.all_gather_object(everyone, calls)
            assert everyone == [calls] * here.size
    with recorded() as calls:
        nng.FIM(model, batches, nng.PMatEKFAC, process_group=here.group)
    kinds = [c[0] for c in calls]
    assert kinds.count("all_reduce") == 2 and 1 <= kinds.count("broadcast") <= here.size
