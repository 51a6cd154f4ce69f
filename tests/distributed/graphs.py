"""Kernels over several processes that keep their graph, are estimated from random signs, or taken apart by positions:
those of one process, and their gradients.
"""

from __future__ import annotations

import copy

import cuts
import pytest
import torch
from kernels import KINDS, others
from launch import Check, Here, check

import nngeom as nng

CHECKS: dict[str, Check] = {}


def weights(t: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Fixed numbers of no symmetry."""
    return torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module, number: torch.Tensor) -> list[torch.Tensor | None]:
    """What a backward pass from ``number`` leaves in ``.grad``."""
    model.zero_grad(set_to_none=True)
    number.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same_gradients(here: Here, many, one, tolerance: float = 1e-11) -> None:
    for x, y in zip(many, one, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            cuts.close(x, y, tolerance)
            here.same(x)


def compare(here: Here, name: str, kind: str, **options) -> None:
    """The kernel, and the gradient of a function of it, of one process and of all."""
    case = cuts.data(name)
    own = cuts.mine(case.loader, here.rank, here.size)
    theirs = dict(options)
    if options.pop("between", False):
        theirs.pop("between")
        options["other"], theirs["other"] = others(name, here)
    if options.pop("metric", False):
        options["metric"] = theirs["metric"] = nng.FIM(case.model, case.loader, nng.PMatKFAC).inverse(0.1)
    measure = lambda data, **o: nng.GramMatrix(case.model, data, KINDS[kind], differentiable=True, **o)
    one, many = measure(case.loader, **options), measure(own, process_group=here.group, **theirs)
    cuts.close(many.tensor.detach(), one.tensor.detach())
    here.same(many.tensor.detach())
    number = lambda k: (k.tensor * weights(k.tensor)).sum() + k.tensor.square().sum()
    same_gradients(here, gradients(case.model, number(many)), gradients(case.model, number(one)))


VARIANTS = {
    "": {},
    "between": {"between": True},
    "in a metric": {"metric": True},
    "of a loss": {"loss": "cross_entropy"},
    "by small tiles": {"memory_budget": 40_000},
    "centred": {"centered": True},
}
for kind in KINDS:
    for label, options in VARIANTS.items():
        if kind != "diag" or not {"between", "centered"} & options.keys():
            CHECKS[f"graph of {kind} {label}"] = lambda here, k=kind, o=options: compare(here, "mlp", k, **o)
for name in ("conv2d", "tied"):
    CHECKS[f"graph of {name}"] = lambda here, n=name: compare(here, n, "dense")


@check(CHECKS)
def graphs_of_layers(here: Here) -> None:
    case = cuts.data("conv2d")
    own = cuts.mine(case.loader, here.rank, here.size)
    one = nng.GramMatrices(case.model, case.loader, differentiable=True)
    many = nng.GramMatrices(case.model, own, differentiable=True, process_group=here.group)
    assert one.keys() == many.keys()
    first = next(iter(many))  # of one of them, twice
    twice = [gradients(case.model, many[first].trace()) for _ in range(2)]
    same_gradients(here, twice[1], twice[0], 0.0)
    number = lambda ks: sum((k.tensor * weights(k.tensor, j)).sum() for j, k in enumerate(ks.values()))
    same_gradients(here, gradients(case.model, number(many)), gradients(case.model, number(one)))
    one = nng.GramMatrices(case.model, case.loader, differentiable=True)
    same_gradients(here, twice[0], gradients(case.model, one[first].trace()))


@check(CHECKS)
def a_graph_beside_a_loss(here: Here) -> None:
    """In the loss of a replicated model: the gradient of one process on the joint batch."""
    case = cuts.data("mlp")
    x, y = case.loader[here.rank]
    batches = case.loader[: here.size]
    model = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(case.model))
    penalty = lambda m, data, **o: nng.GramMatrix(m, data, differentiable=True, **o).tensor.square().sum()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    (loss + penalty(model, [(x, y)], process_group=here.group)).backward()
    losses = [torch.nn.functional.cross_entropy(case.model(x), y) for x, y in batches]
    one = gradients(case.model, sum(losses) / here.size + penalty(case.model, batches))
    same_gradients(here, [p.grad for p in model.parameters()], one)


@check(CHECKS)
def graphs_refused(here: Here) -> None:
    case = cuts.data("mlp")
    own = cuts.mine(case.loader, here.rank, here.size)
    measure = lambda data=own, **o: nng.GramMatrix(case.model, data, differentiable=True, process_group=here.group, **o)
    kernel = measure()
    with pytest.raises(nng.RankMismatchError, match=r"gradient of a kernel: .* other vectors"):
        (kernel.tensor * (1.0 + here.rank)).sum().backward()
    with pytest.raises(nng.UnsupportedError, match="differentiable once"):
        torch.autograd.grad(kernel.trace(), [next(case.model.parameters())], create_graph=True)
    _, mine = others("mlp", here)
    for options in ({"representation": nng.FMatDiag}, {"other": mine}):
        with pytest.raises(nng.UnsupportedError, match="leave centered= out"):
            measure(centered=True, **options)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises((nng.UnsupportedError, nng.PeerError), match="are none of them; detach"):
        measure(function=lambda x, y: scale * case.model(x))
    with pytest.raises(nng.SizeError, match=r"pass memory_budget=\d+ to have it whole"):
        measure(memory_budget=500)
    with pytest.raises(nng.RankMismatchError, match="differentiable"):
        nng.GramMatrix(case.model, own, differentiable=here.rank == 0, process_group=here.group)
    compare(here, "mlp", "dense")


# -- random signs ------------------------------------------------------------------------------------------------------


def drawn(here: Here, name: str, kind: str, **options) -> None:
    """An estimate of one process and of all, whose own generators differ."""
    case = cuts.data(name)
    own = cuts.mine(case.loader, here.rank, here.size)
    theirs = dict(options)
    if options.pop("between", False):
        theirs.pop("between")
        options["other"], theirs["other"] = others(name, here)
    draws = lambda seed: {"estimator": "rademacher", "samples": 3, "generator": torch.Generator().manual_seed(seed)}
    one = nng.GramMatrix(case.model, case.loader, KINDS[kind], **draws(5), **options)
    many = nng.GramMatrix(case.model, own, KINDS[kind], **draws(5 + here.rank), **theirs, process_group=here.group)
    if kind == "diag":
        pairs = [(many.samples, one.samples)]
    else:
        pairs = [(many.kernel.tensor, one.kernel.tensor), (many.standard_error, one.standard_error)]
        pairs += [(many.traces, one.traces)]
    for x, y in pairs:
        cuts.close(x.detach(), y.detach())
        here.same(x.detach())
    if options.get("differentiable"):
        number = lambda e: e.trace().value
        same_gradients(here, gradients(case.model, number(many)), gradients(case.model, number(one)))


for label, options in {"": {}, "between": {"between": True}, "with a graph": {"differentiable": True}}.items():
    for kind in ("diag", "dense"):
        if kind != "diag" or "between" not in options:
            CHECKS[f"signs {kind} {label}"] = lambda here, k=kind, o=options: drawn(here, "conv2d", k, **o)


@check(CHECKS)
def signs_refused(here: Here) -> None:
    case = cuts.data("mlp")
    own = cuts.mine(case.loader, here.rank, here.size)
    measure = lambda **o: nng.GramMatrix(case.model, own, process_group=here.group, **o)
    with pytest.raises(nng.RankMismatchError, match="rows is"):
        measure(estimator="rademacher", samples=1 + here.rank)
    with pytest.raises(nng.ArgumentError, match="sharded=True is of FMatDense, without"):
        measure(estimator="rademacher", sharded=True)
    with pytest.raises(nng.LoaderError, match="no example"):
        nng.GramMatrix(case.model, [], nng.FMatDiag, estimator="rademacher", process_group=here.group)
    drawn(here, "mlp", "dense")


# -- positions ---------------------------------------------------------------------------------------------------------


def sequences(sizes=(2, 3, 2, 2), positions: int = 5):
    """A model of positions, what is made of it, and batches."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    loader = [(torch.randn(n, positions, 3, dtype=torch.float64), torch.zeros(n, dtype=torch.long)) for n in sizes]
    return model, loader, {"function": lambda x, y: model(x).sum(1), "by_position": True}


@check(CHECKS)
def kernels_by_position(here: Here) -> None:
    model, loader, options = sequences()
    own = cuts.mine(loader, here.rank, here.size)
    other = loader[:2] if here.rank == 1 else []
    fisher = nng.FIM(model, loader, nng.PMatKFAC, function=options["function"])
    for more in ({}, {"loss": "cross_entropy"}, {"metric": fisher.inverse(0.1)}, {"memory_budget": 20_000}):
        for theirs in ({}, {"other": other}):
            all_ = {"other": loader[:2]} if theirs else {}
            one = nng.GramMatrix(model, loader, **options, **more, **all_)
            many = nng.GramMatrix(model, own, **options, **more, **theirs, process_group=here.group)
            assert many.tensor.shape == one.tensor.shape and many.tensor.shape[-1] == 5
            cuts.close(many.tensor, one.tensor)
            here.same(many.tensor)
            cuts.close(many.total().tensor, one.total().tensor)


@check(CHECKS)
def positions_refused(here: Here) -> None:
    model, loader, options = sequences()
    own = cuts.mine(loader, here.rank, here.size)
    measure = lambda data, **o: nng.GramMatrix(model, data, **options, **o, process_group=here.group)
    shorter = [(x[:, : 5 - (here.rank == 1)], y) for x, y in loader]
    with pytest.raises(nng.OutputError, match="4 and 5 positions on different processes"):
        measure(shorter)
    with pytest.raises(nng.SizeError, match=r"pass memory_budget=\d+ to have it whole"):
        measure(own, memory_budget=500)
    with pytest.raises(nng.ArgumentError, match="by_position=True is of FMatDense"):
        measure(own, differentiable=True)
    measure(own)
