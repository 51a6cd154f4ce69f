"""Matrices known by products, Hessians, covariances: those of one process on all data, the same bits everywhere."""

from __future__ import annotations

import cuts
import pytest
import scores
import torch
from cases import ENTRIES, STORED, representation
from launch import Check, Here
from moments import seeded

import nngeom as nng

CHECKS: dict[str, Check] = dict(scores.CHECKS)
LOSS = {"loss": "cross_entropy"}
IMPLICIT = {
    "FIM": lambda m, data, seed, **o: nng.FIM(m, data, nng.PMatImplicit, **o),
    "FIM_MonteCarlo": lambda m, data, seed, **o: nng.FIM_MonteCarlo(m, data, nng.PMatImplicit, generator=seed, **o),
    "Hessian": lambda m, data, seed, **o: nng.Hessian(m, data, **LOSS, **o),
    "GradientCovariance": lambda m, data, seed, **o: nng.GradientCovariance(m, data, nng.PMatImplicit, **LOSS, **o),
    "GGN": lambda m, data, seed, **o: nng.GGN(m, data, nng.PMatImplicit, **LOSS, **o),
}


def pair(here: Here, name: str, measure: str):
    """The same matrix of one process and of all."""
    case = cuts.data(name)
    own = cuts.mine(case.loader, here.rank, here.size)
    make = IMPLICIT[measure]
    return make(case.model, case.loader, seeded(0)), make(case.model, own, seeded(here.rank), process_group=here.group)


def readings(matrix, rank: int, *, all_of: bool) -> dict[str, torch.Tensor]:
    """What products give: draws by other generators on every rank, that of rank 0 counts. Few, or ``all_of`` them."""
    torch.manual_seed(5 + rank)
    draws = lambda: torch.Generator().manual_seed(7 + rank)
    v = nng.PVector.randn(matrix.layer_collection, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = {"product": matrix.mv(v).flat(), "one product": matrix.mv(v[0]).flat(), "trace": matrix.trace()}
    if not all_of:
        return out
    out |= {
        "diagonal": matrix.diag().flat(),
        "solution": matrix.solve(v[0], 3.0, tol=1e-10, indefinite="Hessian" in type(matrix).__name__).flat(),
        "hutchinson": matrix.trace("hutchinson", 2, draws()).value,
        "global draws": matrix.trace("hutch++", 3).value,
        "more global draws": matrix.trace("hutch++", 3).value,
        "largest": matrix.lanczos(2, generator=draws())[0],
        "log det": matrix.logdet(5.0, "slq", 4, 2, draws()).value,
        "layer": next(iter(matrix.by_layer().values())).trace(),
    }
    return {name: x.detach() for name, x in out.items()}


def implicit(here: Here, name: str, measure: str) -> None:
    """All readings."""
    one, many = pair(here, name, measure)
    all_of = measure in ("FIM", "Hessian") and name == "mlp"
    one, many = readings(one, 0, all_of=all_of), readings(many, here.rank, all_of=all_of)
    for what, x in many.items():
        cuts.close(x, one[what], 1e-8 if what in ("solution", "largest", "log det") else 1e-11)
        here.same(x)


def stored(here: Here, name: str, kind: str, measure, **options) -> None:
    """A representation of a Hessian or a covariance."""
    case = cuts.data(name)
    own, r = cuts.mine(case.loader, here.rank, here.size), representation(kind, case.model)
    one = measure(case.model, case.loader, r, **LOSS, **options)
    many = measure(case.model, own, r, **LOSS, **options, process_group=here.group)
    assert many.examples == case.n
    cuts.close(many.to_dense(), one.to_dense(), 1e-10)
    for t in cuts.tensors(many):
        here.same(t)


def rescaled(here: Here) -> None:
    """New eigenvalues in a kept basis, of second moments and of a Hessian."""
    case = cuts.data("conv2d")
    own, basis = cuts.mine(case.loader, here.rank, here.size), nng.FIM(case.model, case.loader, nng.PMatEKFAC)
    for measure, options in ((nng.FIM, {}), (nng.Hessian, LOSS)):
        one = basis.rescaled(case.model, case.loader, measure, **options)
        many = basis.rescaled(case.model, own, measure, **options, process_group=here.group)
        cuts.close(many.to_dense(), one.to_dense())


def other_vectors(here: Here) -> None:
    """A product with other vectors on each rank is no product, and the next one is."""
    _, many = pair(here, "mlp", "FIM")
    v = nng.PVector.randn(
        many.layer_collection, generator=torch.Generator().manual_seed(here.rank), dtype=torch.float64
    )
    with pytest.raises(nng.RankMismatchError, match="gave other vectors than rank 0"):
        many.mv(v)
    assert f"over {here.size} processes" in repr(many)
    many.mv(nng.PVector.from_flat(many.layer_collection, torch.ones_like(v.flat())))


CHECKS["rescaled"], CHECKS["other vectors"] = rescaled, other_vectors
for measure in IMPLICIT:
    for name in ("mlp", "conv1d", "gru") if measure in ("FIM", "Hessian") else ("mlp",):
        CHECKS[f"{measure} {name} implicit"] = lambda here, a=(name, measure): implicit(here, *a)
for kind in [k for k in STORED if k in ENTRIES or k == "ekfac"]:
    CHECKS[f"Hessian {kind}"] = lambda here, k=kind: stored(here, "mlp", k, nng.Hessian)
for kind in ("dense", "diag", "ekfac"):
    CHECKS[f"centred FIM {kind}"] = lambda here, k=kind: stored(
        here, "mlp", k, lambda m, data, r, loss, **o: nng.FIM(m, data, r, centered=True, **o)
    )
for kind in ("dense", "low-rank", "ekfac", "quasi-diag"):
    CHECKS[f"GradientCovariance {kind}"] = lambda here, k=kind: stored(here, "conv2d", k, nng.GradientCovariance)
