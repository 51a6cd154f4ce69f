"""Quantities of a model on data, and files: those of one process on all data, the same bits everywhere."""

from __future__ import annotations

import cuts
import pytest
import torch
from launch import Check, Here, check

import nngeom as nng
from nngeom import analysis, linearized, mgs

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
def alignment_with_labels(here: Here) -> None:
    """That of the kernel, which one process makes, from sums over all examples of as many numbers as parameters."""
    for name in ("mlp", "layer-norm", "depthwise", "embedding"):
        case = cuts.data(name)
        own, y = cuts.mine(case.loader, here.rank, here.size), torch.cat([y for _, y in case.loader])
        kernels, whole = nng.GramMatrices(case.model, case.loader), nng.GramMatrix(case.model, case.loader)
        for targets in (y, torch.randn(len(y), 3, dtype=torch.float64)):
            start = sum(len(y) for _, y in case.loader[: (0, *cuts.CUTS[here.size])[here.rank]])
            mine = []
            for x, _ in own:
                mine, start = [*mine, (x, targets[start : start + len(x)])], start + len(x)
            for centered in (True, False):
                many = analysis.label_alignment(case.model, mine, centered, True, process_group=here.group)
                for layer, value in many.items():
                    one = analysis.kernel_label_alignment(kernels[layer], targets, centered=centered)
                    cuts.close(value, one, 1e-10)
                    here.same(value)
                value = analysis.label_alignment(case.model, mine, centered, process_group=here.group)
                cuts.close(value, analysis.kernel_label_alignment(whole, targets, centered=centered), 1e-10)


@check(CHECKS)
def labels_are_those_of_all(here: Here) -> None:
    """Whether labels are 0 and 1 or -1 and 1 is seen on all of them; kinds that differ are told."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(2, 1).double(), torch.randn(4, 2, dtype=torch.float64)
    of = lambda y: [(x, torch.tensor(y)[:, None])]
    labels = of([1, 1, 1, 1]) if here.rank else of([0, 1, 0, 1])
    align = lambda data, **o: analysis.label_alignment(model, data, process_group=here.group, **o)
    every = [batch for rank in range(here.size) for batch in (of([1, 1, 1, 1]) if rank else of([0, 1, 0, 1]))]
    cuts.close(align(labels), analysis.label_alignment(model, every))
    with pytest.raises(nng.OutputError, match="-1 and 1"):
        align(of([-1, 1, 1, 1]) if here.rank else of([0, 1, 0, 1]))
    with pytest.raises(nng.RankMismatchError, match="of one kind"):
        align(of([1.5, 1.0, 1.0, 1.0]) if here.rank else labels)
    with pytest.raises(nng.LoaderError if here.rank == 0 else nng.PeerError, match="needs labels"):
        align([(x,)] if here.rank == 0 else labels)
    short = [(x, torch.tensor([[0], [1], [0]]))]
    with pytest.raises(nng.OutputError if here.rank == 0 else nng.PeerError, match="3 labels of 4 examples"):
        align(short if here.rank == 0 else labels)
    with pytest.raises(nng.RankMismatchError, match="centered"):
        align(labels, centered=here.rank == 0)


def second(case, here: Here):
    """Other examples: all, and this process's."""
    loader = [(1.25 * x, y) for x, y in case.loader[1:3]]
    return loader, loader if here.rank == here.size - 1 else []


@check(CHECKS)
def stiffness_of_pairs(here: Here) -> None:
    case = cuts.data("mlp")
    own, (whole, mine) = cuts.mine(case.loader, here.rank, here.size), second(case, here)
    measure = lambda data, **o: analysis.stiffness(case.model, data, **o)
    for options, theirs in (({}, {}), ({"kind": "sign"}, {"kind": "sign"}), ({"other": whole}, {"other": mine})):
        one, many = measure(case.loader, **options), measure(own, process_group=here.group, **theirs)
        for name in ("matrix", "distance", "mean", "classes", "by_class", "within", "between"):
            x, y = getattr(many, name), getattr(one, name)
            assert torch.equal(x.isnan(), y.isnan())
            cuts.close(x.nan_to_num(), y.nan_to_num(), 1e-10)
            here.same(x)
    regression = lambda data: [(x, x[:, :3] + 1) for x, _ in data]
    many = measure(regression(own), loss="mse", process_group=here.group)
    cuts.close(many.matrix, measure(regression(case.loader), loss="mse").matrix, 1e-10)
    assert not many.has_classes
    with pytest.raises(nng.RankMismatchError, match="kind"):
        measure(own, kind="sign" if here.rank else "cosine", process_group=here.group)
    with pytest.raises(nng.LoaderError, match="no example"):
        measure([], process_group=here.group)


@check(CHECKS)
def eigenfunctions_of_all(here: Here) -> None:
    case = cuts.data("mlp")
    own, (whole, mine) = cuts.mine(case.loader, here.rank, here.size), second(case, here)
    one = analysis.eigenfunctions(case.model, case.loader, 3, at=whole, centered=True)
    many = analysis.eigenfunctions(case.model, own, 3, at=mine, centered=True, process_group=here.group)
    for name in ("eigenvalues", "sample", "functions"):
        cuts.close(getattr(many, name), getattr(one, name), 1e-8)
        here.same(getattr(many, name))
    with pytest.raises(nng.ArgumentError, match="k is 0"):
        analysis.eigenfunctions(case.model, own, 0, process_group=here.group)


@check(CHECKS)
def modes_of_a_step(here: Here) -> None:
    case = cuts.data("mlp")
    own, (whole, mine) = cuts.mine(case.loader, here.rank, here.size), second(case, here)
    before = [p.clone() for p in case.model.parameters()]
    one = analysis.step_modes(case.model, case.loader, 0.1, k=3, at=whole)
    many = analysis.step_modes(case.model, own, 0.1, k=3, at=mine, process_group=here.group)
    names = ("eigenvalues", "functions", "predicted", "actual", "residual", "change", "predicted_change")
    for name in (*names, "elsewhere", "predicted_elsewhere"):
        cuts.close(getattr(many, name), getattr(one, name), 1e-7)
        here.same(getattr(many, name))
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), before))
    with pytest.raises(nng.RankMismatchError, match="lr"):
        analysis.step_modes(case.model, own, 0.1 + here.rank, process_group=here.group)
    with pytest.raises((nng.LoaderError, nng.PeerError), match="needs labels"):
        analysis.step_modes(case.model, [(x,) for x, _ in case.loader], 0.1, process_group=here.group)


@check(CHECKS)
def linearity_of_a_run(here: Here) -> None:
    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).double()
    now, start, case = make(), make(), cuts.data("mlp")
    width = case.loader[0][0].shape[1]
    loader = [(torch.nn.functional.pad(x, (0, 5 - width)), y) for x, y in case.loader]
    one = linearized.linearity(now, start, loader)
    own = cuts.mine(loader, here.rank, here.size)
    many = linearized.linearity(now, start, own, process_group=here.group)
    assert many.units == one.units and many.sign_similarity == one.sign_similarity
    assert abs(many.kernel_alignment - one.kernel_alignment) < 1e-12
    assert abs(many.representation_alignment - one.representation_alignment) < 1e-12
    with pytest.raises(nng.LoaderError, match="no example"):
        linearized.linearity(now, start, [], process_group=here.group)


@check(CHECKS)
def what_is_refused(here: Here) -> None:
    case = cuts.data("mlp")
    for options in ({"differentiable": True}, {"estimator": "rademacher"}):
        with pytest.raises(nng.UnsupportedError, match="not offered with process_group"):
            analysis.geometric_complexity(case.model, case.loader, **options, process_group=here.group)
    calls = (analysis.coherence, mgs.sample_trace, mgs.metrics, analysis.geometric_complexity, analysis.label_alignment)
    for call in calls:
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
