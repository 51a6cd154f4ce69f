"""Kernels over several processes: those of one process on all data, the same bits everywhere."""

from __future__ import annotations

import copy
import pickle

import cuts
import pytest
import torch
from launch import Check, Here, check
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import nngeom as nng
from nngeom import mgs

CHECKS: dict[str, Check] = {}
KINDS = {"dense": nng.FMatDense, "block-diag": nng.FMatBlockDiag, "diag": nng.FMatDiag}


def others(name: str, here: Here):
    """Another set of examples, whole and this process's part: none for rank 0."""
    loader = [tuple(1.25 * t if t.is_floating_point() else t for t in batch) for batch in cuts.data(name).loader[:3]]
    return loader, ([], loader[:2], loader[2:], [])[here.rank] if here.size > 2 else ([], loader)[here.rank]


def compare(here: Here, name: str, kind: str, **options) -> None:
    """A kernel of one process and of all."""
    case = cuts.data(name)
    own = cuts.mine(case.loader, here.rank, here.size)
    theirs = dict(options)
    if options.pop("between", False):
        theirs.pop("between")
        options["other"], theirs["other"] = others(name, here)
    if options.pop("metric", False):
        options["metric"] = theirs["metric"] = nng.FIM(case.model, case.loader, nng.PMatKFAC).inverse(0.1)
    one = nng.GramMatrix(case.model, case.loader, KINDS[kind], **options)
    many = nng.GramMatrix(case.model, own, KINDS[kind], process_group=here.group, **theirs)
    cuts.close(many.tensor, one.tensor)
    here.same(many.tensor)
    if "other" not in options and kind == "dense" and not options.get("centered"):
        assert torch.equal(many.tensor, many.T.tensor)


VARIANTS = {
    "": {},
    "centred": {"centered": True},
    "between": {"between": True},
    "centred between": {"between": True, "centered": True},
    "in a metric": {"metric": True},
    "of a loss": {"loss": "cross_entropy"},
    "by small tiles": {"memory_budget": 40_000},
}
for kind in KINDS:
    for label, options in VARIANTS.items():
        if kind != "diag" or "between" not in options:
            CHECKS[f"kernel {kind} {label}"] = lambda here, k=kind, o=options: compare(here, "mlp", k, **o)
for name in ("conv2d", "gru"):
    CHECKS[f"kernel {name}"] = lambda here, n=name: compare(here, n, "dense")


@check(CHECKS)
def kernels_of_layers(here: Here) -> None:
    case = cuts.data("conv2d")
    own = cuts.mine(case.loader, here.rank, here.size)
    for kind in KINDS.values():
        one = nng.GramMatrices(case.model, case.loader, kind, centered=kind is nng.FMatDiag)
        many = nng.GramMatrices(case.model, own, kind, centered=kind is nng.FMatDiag, process_group=here.group)
        assert one.keys() == many.keys()
        for layer, k in many.items():
            cuts.close(k.tensor, one[layer].tensor)
    one = nng.GramMatrices(case.model, case.loader, centered=True)
    many = nng.GramMatrices(case.model, own, centered=True, process_group=here.group, sharded=True)
    assert one.keys() == many.keys()
    for layer, k in many.items():
        assert isinstance(k, nng.FMatSharded)
        cuts.close(k.gather().tensor, one[layer].tensor)
    for options in ({"differentiable": True}, {"representation": nng.FMatDiag}):
        with pytest.raises((nng.ArgumentError, nng.UnsupportedError)):
            nng.GramMatrices(case.model, own, process_group=here.group, sharded=True, **options)


@check(CHECKS)
def a_function_of_ones_own(here: Here) -> None:
    case = cuts.data("mlp")
    own = cuts.mine(case.loader, here.rank, here.size)
    function = lambda x, y: case.model(x).square()
    many = nng.GramMatrix(case.model, own, function=function, process_group=here.group)
    cuts.close(many.tensor, nng.GramMatrix(case.model, case.loader, function=function).tensor)


@check(CHECKS)
def kernels_refused(here: Here) -> None:
    case = cuts.data("mlp")
    own = cuts.mine(case.loader, here.rank, here.size)
    measure = lambda data=own, **o: nng.GramMatrix(case.model, data, process_group=here.group, **o)
    with pytest.raises(nng.SizeError, match="sharded=True"):
        measure(memory_budget=500)
    with pytest.raises(nng.LoaderError, match="no example"):
        measure([])
    with pytest.raises(nng.LoaderError, match="no example"):
        measure(other=[])
    with pytest.raises(nng.RankMismatchError, match="centered"):
        measure(centered=here.rank == 0)
    bad = [(torch.full_like(x, torch.nan), y) for x, y in own] if here.rank == 1 else own
    if here.size == 2:
        with pytest.raises(nng.NonFiniteError if here.rank == 1 else nng.PeerError, match="batch 0"):
            measure(bad)
    unsent = [(*batch, lambda: 0) for batch in own]
    error = (nng.UnsupportedError, nng.PeerError)
    with pytest.raises(error, match="cannot be sent"):
        measure(unsent, function=lambda x, y, z: case.model(x))
    compare(here, "mlp", "dense")


def readings(kernel) -> dict[str, torch.Tensor]:
    """What a square kernel gives."""
    f = torch.randn(2, kernel.outputs, kernel.columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    f, draws = nng.FVector(f), lambda: torch.Generator().manual_seed(3)
    return {
        "product": kernel.mv(f).tensor,
        "form": kernel.vTMv(f),
        "trace": kernel.trace(),
        "diagonal": kernel.diag().tensor,
        "norm": kernel.norm(),
        "solution": kernel.solve(nng.FVector(f.tensor[0]), 2.0).tensor,
        "transposed": kernel.T.mv(f).tensor,
        "scaled": (3.0 * kernel).mv(f).tensor,
        "largest": kernel.lanczos(2, generator=draws(), tol=1e-10)[0] if hasattr(kernel, "lanczos") else None,
    }


def compare_readings(here: Here, many, one) -> None:
    """Of a kernel by products against the whole one."""
    assert f"over {here.size} processes" in repr(many)
    expected = readings(one)
    expected["largest"] = one.eigvalsh().flip(0)[:2]
    for name, x in readings(many).items():
        cuts.close(x, expected[name], {"solution": 1e-5, "largest": 1e-8}.get(name, 1e-11))
        here.same(x)


@check(CHECKS)
def implicit_kernels(here: Here) -> None:
    for name, centered in (("mlp", False), ("conv2d", True)):
        case = cuts.data(name)
        own = cuts.mine(case.loader, here.rank, here.size)
        one = nng.GramMatrix(case.model, case.loader, centered=centered)
        many = nng.GramMatrix(case.model, own, nng.FMatImplicit, centered=centered, process_group=here.group)
        compare_readings(here, many, one)
        whole, mine = others(name, here)
        one = nng.GramMatrix(case.model, case.loader, other=whole, centered=centered)
        options = {"centered": centered, "process_group": here.group}
        many = nng.GramMatrix(case.model, own, nng.FMatImplicit, other=mine, **options)
        f = nng.FVector(torch.ones(one.outputs, one.columns, dtype=torch.float64))
        cuts.close(many.mv(f).tensor, one.mv(f).tensor, 1e-11)
        cuts.close(many.materialize().tensor, one.tensor, 1e-11)
        g = nng.FVector(torch.linspace(-1, 2, one.outputs * one.rows, dtype=torch.float64).view(one.outputs, -1))
        cuts.close(many.T.mv(g).tensor, one.T.mv(g).tensor, 1e-11)


@check(CHECKS)
def jacobians(here: Here) -> None:
    for name, centered in (("mlp", False), ("gru", True)):
        case = cuts.data(name)
        own = cuts.mine(case.loader, here.rank, here.size)
        one = nng.Jacobian(case.model, case.loader, centered=centered)
        v = nng.PVector.from_flat(one.layer_collection, torch.linspace(-1, 1, one.shape[2], dtype=torch.float64))
        u = one.mv(v)
        for push in (nng.PushForwardDense, nng.PushForwardImplicit):
            many = nng.Jacobian(case.model, own, push, centered=centered, process_group=here.group)
            assert many.shape == one.shape
            cuts.close(many.mv(v).tensor, u.tensor, 1e-11)
            cuts.close(many.T.mv(u).flat(), one.T.mv(u).flat(), 1e-11)
            cuts.close(many.norm(), one.norm(), 1e-11)
            here.same(many.mv(v).tensor)
        for pull in (nng.PullBackDense, nng.PullBackImplicit):
            many = nng.Jacobian(case.model, own, pull, centered=centered, process_group=here.group)
            cuts.close(many.mv(u).flat(), one.T.mv(u).flat(), 1e-11)
        many = nng.Jacobian(case.model, own, nng.PushForwardImplicit, process_group=here.group)
        plain = nng.Jacobian(case.model, case.loader)
        cuts.close(many.materialize().tensor, plain.tensor)
        first = one.layer_collection.names[0]
        cuts.close(many[first], plain[first])
        cuts.close((many @ many.T).trace(), (plain @ plain.T).trace())
        for kind in (nng.PMatDiag, nng.PMatDense):
            measured = (many.T @ many).measured(kind)
            cuts.close(measured.to_dense(), (plain.T @ plain).measured(kind).to_dense(), 1e-11)


@check(CHECKS)
def a_penalty_in_the_loss(here: Here) -> None:
    """What is said to have the right gradient where GramMatrix(differentiable=True) is refused."""
    case = cuts.data("mlp")
    x, y = case.loader[here.rank]
    model = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(case.model))
    (torch.nn.functional.cross_entropy(model(x), y) + mgs.trace_penalty(model, x, reduction="mean")).backward()
    total = []
    for x, y in case.loader[: here.size]:
        f = torch.nn.functional.cross_entropy(case.model(x), y) + mgs.trace_penalty(case.model, x, reduction="mean")
        total.append(torch.cat([g.flatten() for g in torch.autograd.grad(f, list(case.model.parameters()))]))
    mine = torch.cat([p.grad.flatten() for p in model.parameters()])
    cuts.close(mine, torch.stack(total).mean(0), 1e-12)
    here.same(mine)


@check(CHECKS)
def sharded_jacobians(here: Here) -> None:
    case = cuts.data("conv2d")
    own = cuts.mine(case.loader, here.rank, here.size)
    for centered in (False, True):
        one = nng.Jacobian(case.model, case.loader, centered=centered)
        many = nng.Jacobian(case.model, own, centered=centered, process_group=here.group, sharded=True)
        n = many.places.counts[here.rank]
        assert many.strip.shape == (one.shape[0], n, one.shape[2]) and many.shape == one.shape
        assert f"{n} rows here" in repr(many)
        v = nng.PVector.randn(one.layer_collection, 2, generator=torch.Generator().manual_seed(0)).to(torch.float64)
        u = one.mv(v)
        cuts.close(many.mv(v).tensor, u.tensor, 1e-11)
        cuts.close(many.T.mv(u).flat(), one.T.mv(u).flat(), 1e-11)
        cuts.close((many.T @ u).flat(), (one.T @ u).flat(), 1e-11)
        cuts.close(many.norm(), one.norm(), 1e-11)
        here.same(many.mv(v).tensor)
        cuts.close((2.0 * many - 0.5 * many).materialize().tensor, 1.5 * one.tensor, 1e-11)
        cuts.close(many.T.materialize().tensor, one.tensor, 1e-11)
        first = one.layer_collection.names[0]
        cuts.close(many[first], one[first], 1e-11)
    pull = nng.Jacobian(case.model, own, nng.PullBackDense, process_group=here.group, sharded=True)
    plain = nng.Jacobian(case.model, case.loader)
    cuts.close(pull.mv(u).flat(), plain.T.mv(u).flat(), 1e-11)
    fisher = nng.FIM(case.model, case.loader, nng.PMatKFAC)
    cuts.close((fisher @ pull.T).materialize().tensor, (fisher @ plain).tensor, 1e-11)
    cuts.close(fisher.solve(pull.T, 0.1).materialize().tensor, fisher.solve(plain, 0.1).tensor, 1e-10)
    w = nng.PVector(v.layer_collection, v.flat().clone().requires_grad_())
    pull.T.mv(w).tensor.square().sum().backward()
    cuts.close(w.flat().grad, 2 * (plain.T @ (plain @ v)).flat(), 1e-10)
    for call in (lambda: pull.T @ pull, lambda: pull @ pull.T, lambda: pickle.dumps(pull), lambda: pull.T + plain):
        with pytest.raises(nng.UnsupportedError, match="sharded map"):
            call()
    with pytest.raises(nng.UnsupportedError):
        nng.save(pull, here.folder / "pull")
    with pytest.raises(nng.ArgumentError, match="sharded=True"):
        nng.Jacobian(case.model, own, nng.PushForwardImplicit, process_group=here.group, sharded=True)
    with pytest.raises(nng.RankMismatchError, match="other vectors"):
        pull.T.mv((1.0 + here.rank) * v)
    with pytest.raises(nng.RankMismatchError, match="sharded"):
        nng.Jacobian(case.model, own, process_group=here.group, sharded=here.rank == 0)


def sharded_pair(here: Here, name: str, **options):
    case = cuts.data(name)
    own = cuts.mine(case.loader, here.rank, here.size)
    one = nng.GramMatrix(case.model, case.loader, **options)
    return nng.GramMatrix(case.model, own, **options, process_group=here.group, sharded=True), one


@check(CHECKS)
def sharded_kernels(here: Here) -> None:
    for name, options in (("mlp", {}), ("conv2d", {"centered": True})):
        many, one = sharded_pair(here, name, **options)
        n, lo = many.places.counts[here.rank], many.offsets[here.rank]
        assert many.strip.shape == (one.outputs, n, one.outputs, one.columns)
        cuts.close(many.strip, one.tensor[:, lo : lo + n])
        compare_readings(here, many, one)


@check(CHECKS)
def sharded_kernels_gathered_and_added(here: Here) -> None:
    many, one = sharded_pair(here, "mlp")
    cuts.close(many.gather().tensor, one.tensor)
    for rank in range(here.size):
        found = many.gather(rank)
        assert (found is None) == (rank != here.rank)
        if found is not None:
            cuts.close(found.tensor, one.tensor)
    total = 2.0 * many + many
    assert isinstance(total, nng.FMatSharded)
    cuts.close(total.to_dense(), 3 * one.to_dense())
    cuts.close((many - 0.5 * many).norm(), 0.5 * one.norm())
    assert many.to(torch.float32).dtype is torch.float32
    whole, mine = others("mlp", here)
    case = cuts.data("mlp")
    own = cuts.mine(case.loader, here.rank, here.size)
    between = nng.GramMatrix(case.model, own, other=mine, process_group=here.group, sharded=True)
    cuts.close(between.gather().tensor, nng.GramMatrix(case.model, case.loader, other=whole).tensor)
    f = torch.ones(between.outputs, between.columns, dtype=torch.float64, requires_grad=True)
    between.mv(nng.FVector(f)).tensor.square().sum().backward()
    dense = nng.GramMatrix(case.model, case.loader, other=whole).to_dense()
    cuts.close(f.grad.flatten(), 2 * dense.T @ dense @ torch.ones_like(f.detach().flatten()), 1e-11)
    for what in (lambda: between.T, lambda: many.eigh(), lambda: many.inverse(1.0)):
        with pytest.raises(nng.UnsupportedError, match="gather"):
            what()
    for what in (lambda: between.solve(nng.FVector(f.detach()[:, :1])), between.effective_rank):
        with pytest.raises(nng.ArgumentError, match="symmetric"):
            what()


@check(CHECKS)
def sharded_kernels_estimate(here: Here) -> None:
    """With all Lanczos steps quadrature is exact up to the draws; the draws are rank 0's."""
    many, one = sharded_pair(here, "mlp")
    torch.manual_seed(here.rank)
    values = one.eigvalsh().clamp_min(0)
    shares = values / values.sum()
    rank = float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
    for estimate, exact in (
        (many.effective_rank(samples=200), rank),
        (many.logdet(1.0, samples=200), float(one.logdet(1.0))),
        (many.trace("hutchinson", 200), float(one.trace())),
    ):
        here.same(estimate.value)
        assert abs(float(estimate) - exact) <= 5 * float(estimate.standard_error) + 1e-9 * exact
    f = nng.FVector(torch.linspace(-1, 2, many.shape[0], dtype=torch.float64).view(many.outputs, -1))
    here.same(many.solve(f, 1e-3, max_steps=1, strict=False).tensor)
    with pytest.raises(nng.ConvergenceError):
        many.solve(f, 1e-3, max_steps=1)


@check(CHECKS)
def sharded_kernels_refuse(here: Here) -> None:
    many, _ = sharded_pair(here, "mlp")
    generator = torch.Generator().manual_seed(here.rank)
    f = torch.randn(many.outputs, many.rows, dtype=torch.float64, generator=generator)
    with pytest.raises(nng.RankMismatchError, match="other vectors"):
        many.mv(nng.FVector(f))
    with pytest.raises(nng.UnsupportedError, match="not pickled"):
        pickle.dumps(many)
    for rank in (-1, here.size, True, 0.5):
        with pytest.raises(nng.ArgumentError, match="rank is"):
            many.gather(rank)
    case = cuts.data("mlp")
    for kind, options in ((nng.FMatDiag, {}), (nng.FMatImplicit, {}), (nng.FMatDense, {"differentiable": True})):
        with pytest.raises(nng.ArgumentError, match="sharded=True"):
            nng.GramMatrix(case.model, case.loader, kind, sharded=True, process_group=here.group, **options)
    with pytest.raises(nng.ArgumentError, match="Cutoff"):
        many.solve(nng.FVector(torch.ones_like(f)), nng.Cutoff(1e-3))
    cuts.close(
        many.mv(nng.FVector(torch.ones_like(f))).tensor, many.gather().mv(nng.FVector(torch.ones_like(f))).tensor
    )


@check(CHECKS)
def kernels_of_a_model_in_parts(here: Here) -> None:
    case = cuts.data("mlp")
    own = cuts.mine(case.loader, here.rank, here.size)
    parts = copy.deepcopy(case.model)
    fully_shard(parts, mesh=init_device_mesh("cpu", (here.size,)))
    one = nng.GramMatrix(case.model, case.loader)
    measure = lambda f, *args, **o: f(parts, own, *args, process_group=here.group, **o)
    cuts.close(measure(nng.GramMatrix).tensor, one.tensor)
    cuts.close(measure(nng.GramMatrix, sharded=True).gather().tensor, one.tensor)
    cuts.close(sum(k.tensor for k in measure(nng.GramMatrices).values()), one.tensor)
    implicit = measure(nng.GramMatrix, nng.FMatImplicit)
    f = nng.FVector(torch.linspace(-1, 2, one.shape[0], dtype=torch.float64).view(one.outputs, -1))
    cuts.close(implicit.mv(f).tensor, one.mv(f).tensor, 1e-11)
    cuts.close(implicit.diag().tensor, one.diag().tensor)
    whole, push = nng.Jacobian(case.model, case.loader), measure(nng.Jacobian, nng.PushForwardImplicit)
    cuts.close(push.materialize().tensor, whole.tensor)
    cuts.close(push[whole.layer_collection.names[0]], whole[whole.layer_collection.names[0]])
    assert "DTensor" in type(next(parts.parameters())).__name__
