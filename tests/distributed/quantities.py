"""Quantities of a model on data, and files: those of one process on all data, the same bits everywhere."""

from __future__ import annotations

import cuts
import pytest
import torch
from launch import Check, Here, check

import nngeom as nng
from nngeom import analysis, mgs

CHECKS: dict[str, Check] = {}

QUANTITIES = {
    "coherence": lambda m, data, **o: (
        (c := analysis.coherence(m, data, **o)).alpha,
        torch.stack([x.alpha for x in c.by_layer.values()]),
    ),
    "sharpness": lambda m, data, **o: (analysis.sharpness(m, data, tol=1e-10, **o),),
    "non_uniformity": lambda m, data, **o: (analysis.non_uniformity(m, data, tol=1e-8, **o),),
    "geometric_complexity": lambda m, data, **o: (analysis.geometric_complexity(m, data, **o),),
    "sample_trace": lambda m, data, **o: (mgs.sample_trace(m, data, **o),),
    "sample_fisher_trace": lambda m, data, **o: (mgs.sample_fisher_trace(m, data, **o),),
    "ComplexityMeasure": lambda m, data, **o: (torch.tensor(analysis.ComplexityMeasure(m, data, **o)._root),),
}


def compare(here: Here, name: str) -> None:
    """One process on everything, and all on their parts."""
    case = cuts.data("mlp")
    own = cuts.mine(case.loader, here.rank, here.size)
    measure = QUANTITIES[name]
    data = lambda batches: [(x,) for x, _ in batches] if "trace" in name or "omplexity" in name else batches
    one, many = measure(case.model, data(case.loader)), measure(case.model, data(own), process_group=here.group)
    for x, y in zip(many, one):
        cuts.close(x, y, 1e-6 if name == "non_uniformity" else 1e-9)
        here.same(x)


for name in QUANTITIES:
    CHECKS[name] = lambda here, n=name: compare(here, n)


@check(CHECKS)
def metrics_of_batches(here: Here) -> None:
    case = cuts.data("mlp")
    ends = (0, *cuts.CUTS[here.size], len(case.loader))
    own = [(x,) for x, _ in case.loader[ends[here.rank] : ends[here.rank + 1]]]
    one = mgs.metrics(case.model, [(x,) for x, _ in case.loader])
    many = mgs.metrics(case.model, own, process_group=here.group)
    for name in ("trace", "logdet", "rank", "cosine"):
        cuts.close(getattr(many, name), getattr(one, name), 1e-9)
    c = analysis.coherence(case.model, case.loader[ends[here.rank] : ends[here.rank + 1]], process_group=here.group)
    cuts.close(c.by_batch, analysis.coherence(case.model, case.loader).by_batch, 1e-9)


@check(CHECKS)
def what_is_refused(here: Here) -> None:
    case = cuts.data("mlp")
    for options in ({"differentiable": True}, {"estimator": "rademacher"}):
        with pytest.raises(nng.UnsupportedError, match="not offered with process_group"):
            analysis.geometric_complexity(case.model, case.loader, **options, process_group=here.group)
    for call in (analysis.coherence, mgs.sample_trace, mgs.metrics, analysis.geometric_complexity):
        with pytest.raises(nng.LoaderError, match="no example"):
            call(case.model, [], process_group=here.group)


@check(CHECKS)
def files(here: Here) -> None:
    """One writes, all wait, all fail together."""
    case = cuts.data("mlp")
    own = cuts.mine(case.loader, here.rank, here.size)
    matrix = nng.FIM(case.model, own, process_group=here.group)
    path = here.folder / "fisher.safetensors"
    nng.save(matrix, path, process_group=here.group)
    assert torch.equal(nng.load(path).to_dense(), matrix.to_dense())
    with pytest.raises(nng.FileError if here.rank == 0 else nng.PeerError, match="cannot write"):
        nng.save(matrix, here.folder / "no folder" / "fisher", process_group=here.group)
