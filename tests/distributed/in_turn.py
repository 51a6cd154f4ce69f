"""Models under ``fully_shard`` whose parameters are whole only while they are used: the numbers of the whole model."""

from __future__ import annotations

from collections.abc import Callable

import cuts
from cases import STORED, representation
from fully_sharded import hooks, in_parts, sharded
from launch import Check, Here

import nngeom as nng

CHECKS: dict[str, Check] = {}
SMALL = ("mlp", "conv2d", "language-model", "gru", "transformer", "bare")
WIDE = (*SMALL, "tied", "reused", "prelu", "layer-norm", "batch-norm", "frozen", "class-token", "einsum")
ROOM = 2**9  # bytes, less than the parameters


def compare(here: Here, name: str, measure: Callable, *, by_child: bool = True, tolerance: float = 1e-12) -> None:
    case = cuts.data(name)
    model = sharded(case, here, by_child=by_child)
    before = hooks(model)
    one = measure(case.model, case.loader, process_group=None)
    mine = cuts.mine(case.loader, here.rank, here.size)
    many = measure(model, mine, process_group=here.group, memory_budget=ROOM)
    assert float(one.abs().max()) > 1e-6
    cuts.close(many, one, tolerance)
    here.same(many)
    assert in_parts(model) and hooks(model) == before


for name in WIDE:
    CHECKS[f"in turn: {name} dense"] = lambda here, n=name: compare(
        here, n, lambda m, d, **o: nng.EmpiricalFIM(m, d, nng.PMatDense, loss="cross_entropy", **o).to_dense()
    )
for name in ("mlp", "conv2d", "language-model", "gru"):
    for kind in ("diag", "kfac", "ekfac", "low-rank", "mixed"):
        CHECKS[f"in turn: {name} {kind}"] = lambda here, n=name, k=kind: compare(
            here, n, lambda m, d, **o: nng.FIM(m, d, representation(k, m), **o).to_dense(), tolerance=1e-9
        )
for kind in STORED:
    CHECKS[f"in turn: mlp {kind} one group"] = lambda here, k=kind: compare(
        here, "mlp", lambda m, d, **o: nng.FIM(m, d, representation(k, m), **o).to_dense(), by_child=False, tolerance=1e-9
    )
