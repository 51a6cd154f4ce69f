"""Second moments over parameters: those of one process on all data, and the same bits everywhere."""

from __future__ import annotations

import cuts
import torch
import torch.distributed as dist
from cases import STORED, representation
from launch import Check, Here, check
from test_scattered import WAYS, C, N, Scattering, X

import nngeom as nng

CHECKS: dict[str, Check] = {}
MODELS = ("mlp", "conv2d", "language-model", "gru")

MEASURES = {
    "FIM": lambda m, data, r, seed, **o: nng.FIM(m, data, r, **o),
    "EmpiricalFIM": lambda m, data, r, seed, **o: nng.EmpiricalFIM(m, data, r, loss="cross_entropy", **o),
    "GGN": lambda m, data, r, seed, **o: nng.GGN(m, data, r, loss="cross_entropy", **o),
    "FIM_MonteCarlo": lambda m, data, r, seed, **o: nng.FIM_MonteCarlo(m, data, r, samples=2, generator=seed, **o),
    "estimate": lambda m, data, r, seed, **o: nng.FIM(
        m, data, r, estimator="rademacher", samples=2, generator=seed, **o
    ),
}
FEW = ("dense", "kfac", "low-rank", "mixed-sweeps")  # kinds of statistics: summed, of inputs, stacked, two sweeps
ASKED = {
    "FIM": {name: STORED for name in MODELS},
    "FIM_MonteCarlo": {name: FEW for name in MODELS},
    "EmpiricalFIM": {"mlp": FEW},
    "GGN": {"conv2d": FEW},
    "estimate": {"mlp": ("diag", "kfac", "low-rank", "ekfac")},
}


def seeded(rank: int) -> torch.Generator:
    """Another on every rank: that of rank 0 counts."""
    return torch.Generator().manual_seed(3 + rank)


def compare(here: Here, measure: str, name: str, kind: str) -> None:
    """One process on everything, and all on their parts."""
    case = cuts.data(name)
    r = representation(kind, case.model)
    whole = MEASURES[measure](case.model, case.loader, r, seeded(0))
    own = cuts.mine(case.loader, here.rank, here.size)
    part = MEASURES[measure](case.model, own, r, seeded(here.rank), process_group=here.group)
    one, many = (x.matrix if measure == "estimate" else x for x in (whole, part))
    assert many.examples == case.n
    cuts.close(many.to_dense(), one.to_dense(), 1e-11 if r_passes(r) > 1 else 1e-12)
    if measure == "estimate":
        cuts.close(part.trace().standard_error, whole.trace().standard_error, 1e-9)
    for t in cuts.tensors(part):
        here.same(t)


def r_passes(r: object) -> int:
    """Sweeps of a representation, or of a mixture."""
    return getattr(r, "passes", 1)


for measure, asked in ASKED.items():
    for name, kinds in asked.items():
        for kind in kinds:
            CHECKS[f"{measure} {name} {kind}"] = lambda here, a=(measure, name, kind): compare(here, *a)


@check(CHECKS)
def positions_of_the_data(here: Here) -> None:
    """As many for an example as the data says: means over those of all ranks."""
    model, y = Scattering(*WAYS["routed"]), torch.arange(N) % C
    data = [(X[lo:hi], y[lo:hi]) for lo, hi in ((0, 3), (3, 5), (5, 7))]
    for sharing in ("expand", "reduce"):
        kind = nng.PMatKFAC.options(sharing=sharing)
        whole = nng.EmpiricalFIM(model, (X, y), kind, loss="cross_entropy")
        mine = data[here.rank :: here.size]
        part = nng.EmpiricalFIM(model, mine, kind, loss="cross_entropy", process_group=here.group)
        cuts.close(part.to_dense(), whole.to_dense(), 1e-12)
        for t in cuts.tensors(part):
            here.same(t)


@check(CHECKS)
def groups_come_and_go(here: Here) -> None:
    """One is destroyed as soon as a measure is done, with nothing of it under way."""
    case = cuts.data("mlp")
    mine = cuts.mine(case.loader, here.rank, here.size)
    for _ in range(20):
        group = dist.new_group(backend="gloo")
        assert nng.FIM(case.model, mine, nng.PMatDiag, process_group=group).examples == sum(cuts.SIZES)
        dist.destroy_process_group(group)
