"""Influence and rows over several processes: those of one process on all data."""

from __future__ import annotations

import os
import warnings

import cuts
import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import Check, Here, check

import nngeom as nng

CHECKS: dict[str, Check] = {}


def queries(here: Here):
    """All queries, and this process's: rank 0 has none."""
    loader = [(1.25 * x, y) for x, y in cuts.data("mlp").loader[:3]]
    return loader, {0: [], 1: loader[:1] if here.size > 2 else loader, 2: loader[1:], 3: []}[here.rank]


def compare(here: Here, name: str, **options) -> None:
    case = cuts.data("mlp")
    own, (every, mine) = cuts.mine(case.loader, here.rank, here.size), queries(here)
    fisher = nng.FIM(case.model, case.loader, nng.PMatKFAC)
    measure = lambda train, asked, **o: nng.influence(
        case.model, train, asked, fisher, loss="cross_entropy", damping=0.1, **options, **o
    )
    one, many = measure(case.loader, every), measure(own, mine, process_group=here.group)
    for field in ("scores", "self_scores", "values", "indices"):
        x, y = getattr(many, field), getattr(one, field)
        assert (x is None) == (y is None)
        if x is not None:
            cuts.close(x.double(), y.double(), 1e-10)
            here.same(x)
    assert many.by_layer.keys() == one.by_layer.keys()
    for layer, scores in many.by_layer.items():
        cuts.close(scores, one.by_layer[layer], 1e-10)


VARIANTS = {
    "": {},
    "the largest": {"top": 3},
    "more than there are": {"top": 99},
    "by layer": {"by_layer": True},
    "of a function": {"query_function": lambda f, y: f[:, 0]},
    "in small loads": {"memory_budget": 20_000},
}
for label, options in VARIANTS.items():
    CHECKS[f"influence {label}"] = lambda here, l=label, o=options: compare(here, l, **o)


@check(CHECKS)
def influence_by_position(here: Here) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    loader = [(torch.randn(n, 5, 3, dtype=torch.float64), torch.zeros(n, dtype=torch.long)) for n in (2, 3, 2, 2)]
    function = lambda x, y: model(x).sum(1)
    own, mine = cuts.mine(loader, here.rank, here.size), loader[:1] if here.rank else []
    fisher = nng.FIM(model, loader, nng.PMatDiag, function=function)
    options = {"loss": "cross_entropy", "damping": 0.1, "by_position": True, "function": function}
    whole = [batch for rank in range(here.size) for batch in (loader[:1] if rank else [])]
    one = nng.influence(model, loader, whole, fisher, **options)
    many = nng.influence(model, own, mine, fisher, process_group=here.group, **options)
    assert many.scores.ndim == 3
    cuts.close(many.scores, one.scores, 1e-10)
    cuts.close(many.self_scores, one.self_scores, 1e-10)


@check(CHECKS)
def influence_in_a_file(here: Here) -> None:
    case, path = cuts.data("mlp"), here.folder / "scores.npy"
    own, (every, mine) = cuts.mine(case.loader, here.rank, here.size), queries(here)
    fisher = nng.FIM(case.model, case.loader, nng.PMatKFAC)
    options = {"loss": "cross_entropy", "damping": 0.1}
    one = nng.influence(case.model, case.loader, every, fisher, **options)
    for _ in range(2):
        many = nng.influence(case.model, own, mine, fisher, out=path, process_group=here.group, **options)
        cuts.close(many.scores, one.scores, 1e-10)
        cuts.close(many.self_scores, one.self_scores, 1e-10)
        here.same(many.self_scores)
    assert np.array_equal(np.load(path), many.scores.numpy())
    with pytest.raises((nng.ArgumentError, nng.PeerError), match="holds a kernel of other inputs"):
        logit = lambda f, y: f[:, 0]
        nng.influence(
            case.model, own, mine, fisher, query_function=logit, out=path, process_group=here.group, **options
        )
    dist.barrier()
    assert [name for name in os.listdir(here.folder) if name.startswith("scores")] == ["scores.npy"]


@check(CHECKS)
def influence_refused(here: Here) -> None:
    case = cuts.data("mlp")
    own, (_, mine) = cuts.mine(case.loader, here.rank, here.size), queries(here)
    fisher = nng.FIM(case.model, case.loader, nng.PMatKFAC)
    measure = lambda *a, **o: nng.influence(case.model, *a, loss="cross_entropy", process_group=here.group, **o)
    with pytest.raises(nng.RankMismatchError, match="damping"):
        measure(own, mine, fisher, damping=0.1 + here.rank)
    for train, asked in (([], mine), (own, [])):
        with pytest.raises(nng.LoaderError, match="no example"):
            measure(train, asked, fisher, damping=0.1)
    compare(here, "")


def by_products(here: Here, matrix, tolerance: float, **options) -> nng.Influence:
    """Under a matrix known by its products, against the dense one of one process."""
    case = cuts.data("mlp")
    own, (every, mine) = cuts.mine(case.loader, here.rank, here.size), queries(here)
    dense = nng.FIM(case.model, case.loader, nng.PMatDense)
    options = {"loss": "cross_entropy", "damping": 0.1, **options}
    one = nng.influence(case.model, case.loader, every, dense, **options)
    many = nng.influence(case.model, own, mine, matrix, **options, process_group=here.group)
    assert many.self_scores is None
    for field in ("scores", "values"):
        x, y = getattr(many, field), getattr(one, field)
        assert (x is None) == (y is None)
        if x is not None:
            cuts.close(x, y, tolerance)
            here.same(x)
    if many.indices is not None:
        assert torch.equal(many.indices, one.indices)
    for layer, scores in many.by_layer.items():
        cuts.close(scores, one.by_layer[layer], tolerance)
    return many


@check(CHECKS)
def influence_by_products(here: Here) -> None:
    """Solved together by conjugate gradients; alone, each with all data; of parts; of sums."""
    case = cuts.data("mlp")
    own = cuts.mine(case.loader, here.rank, here.size)
    together = nng.FIM(case.model, own, nng.PMatImplicit, process_group=here.group)
    for options in ({}, {"top": 3}, {"top": 99}, {"by_layer": True}, {"query_function": lambda f, y: f[:, 0]}):
        by_products(here, together, 1e-5, **options)
    few = 2 * 3 * 8 * sum(p.numel() for p in case.model.parameters())  # three queries a load
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nng.MemoryWarning)
        by_products(here, together, 1e-5, memory_budget=few + here.rank)
    by_products(here, nng.FIM(case.model, case.loader, nng.PMatImplicit), 1e-5)
    every, mine = queries(here)
    parted = nng.FIM(case.model, own, nng.PMatSharded.of(nng.PMatBlockDiag), process_group=here.group)
    whole = nng.FIM(case.model, case.loader, nng.PMatBlockDiag)
    options = {"loss": "cross_entropy", "damping": 0.1}
    one = nng.influence(case.model, case.loader, every, whole, **options)
    many = nng.influence(case.model, own, mine, parted, **options, process_group=here.group)
    cuts.close(many.scores, one.scores, 1e-9)


@check(CHECKS)
def influence_by_products_refused(here: Here) -> None:
    case = cuts.data("mlp")
    own, (_, mine) = cuts.mine(case.loader, here.rank, here.size), queries(here)
    together = nng.FIM(case.model, own, nng.PMatImplicit, process_group=here.group)
    options = {"loss": "cross_entropy", "damping": 0.1, "process_group": here.group}
    measure = lambda train, asked, matrix=together, **o: nng.influence(case.model, train, asked, matrix, **options, **o)
    with pytest.raises(nng.ArgumentError, match="holds nothing"):
        measure(own, mine, out=here.folder / "implicit.npy")
    for train, asked in (([], mine), (own, [])):
        with pytest.raises(nng.LoaderError, match="no example"):
            measure(train, asked)
    alone = nng.FIM(case.model, case.loader, nng.PMatImplicit)
    with pytest.raises((nng.RankMismatchError, nng.PeerError), match="other products than that of rank 0"):
        measure(own, mine, alone if here.rank != 1 else 2.0 * alone)
    bad = [(torch.full_like(x, torch.nan), y) for x, y in mine] if here.rank == 1 else mine
    with pytest.raises((nng.NonFiniteError, nng.PeerError), match="contain NaN or infinity"):
        measure(own, bad)
    with pytest.raises(nng.SingularError):
        measure(own, mine, -1.0 * together)
    if here.size > 2:
        pair = dist.new_group([0, 1])
        odd = nng.FIM(case.model, own, nng.PMatImplicit, process_group=pair) if here.rank < 2 else alone
        with pytest.raises((nng.ArgumentError, nng.PeerError), match="whose products these make together"):
            measure(own, mine, odd)
    by_products(here, together, 1e-5)


@check(CHECKS)
def rows_of_each(here: Here) -> None:
    case = cuts.data("conv2d")
    own = cuts.mine(case.loader, here.rank, here.size)
    for options in ({}, {"loss": "cross_entropy"}, {"memory_budget": 60_000}):
        one = nng.Jacobian(case.model, case.loader) if "loss" not in options else None
        seen, d = 0, sum(p.numel() for p in case.model.parameters())
        for chunk in nng.rows(case.model, own, process_group=here.group, **options):
            k, _ = chunk.cotangents
            for layout, j in chunk.jacobians.items():
                part = torch.zeros(*j.shape[:2], d, dtype=torch.float64)
                layout.scatter_(part, j.matrix())
                if one is not None:
                    theirs = one.tensor[k : k + j.shape[0], chunk.start : chunk.start + chunk.examples]
                    cuts.close(layout.gather(part), layout.gather(theirs.contiguous()), 1e-11)
            seen += chunk.examples if chunk.first else 0
        assert seen == sum(len(x) for x, _ in own)
    with pytest.raises(nng.LoaderError, match="no example"):
        nng.rows(case.model, [], process_group=here.group)
    with pytest.raises(nng.RankMismatchError, match="rows"):
        nng.rows(case.model, own, loss="mse" if here.rank else "cross_entropy", process_group=here.group)
