"""Kernels of one process or of several, whole on each of them."""

from __future__ import annotations

from typing import Any

from nngeom.fmat.products import Grouping, build
from nngeom.fmat.ring import gathered_kernels
from nngeom.fmat.ring_graph import differentiable_kernels
from nngeom.fmat.side import Side
from nngeom.pmat.metric import Metric


def kernels(
    kind: Any,
    rows: Side,
    columns: Side | None,
    grouping: Grouping,
    *,
    centered: bool = False,
    metric: Metric | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """``{group: kernel}`` of a ``kind`` over the examples of all processes, with its graph where the sweep keeps it."""
    if rows.run.team.size == 1:
        return build(kind, rows, columns, grouping, centered=centered, metric=metric, progress=progress)
    over_all = differentiable_kernels if rows.sweep.policy.keep_graph else gathered_kernels
    return over_all(kind, rows, columns, grouping, centered=centered, metric=metric)
