"""Kernels of which every process keeps the rows of its own examples."""

from __future__ import annotations

from nngeom.fmat.dense import FMatDense
from nngeom.fmat.places import Places
from nngeom.fmat.products import Grouping
from nngeom.fmat.ring import strips
from nngeom.fmat.sharded import FMatSharded
from nngeom.fmat.side import Side
from nngeom.pmat.metric import Metric


def sharded_kernels(
    rows: Side, columns: Side | None, grouping: Grouping, *, centered: bool, metric: Metric | None
) -> dict[str, FMatSharded]:
    """``{group: kernel}``: the strips of an ``FMatDense`` each, not gathered."""
    places = Places.of(rows)
    across = places if columns is None else Places.of(columns)
    found = strips(FMatDense, rows, columns, grouping, (places, across), centered=centered, metric=metric)
    return {name: FMatSharded(strip, places, across, columns is not None) for name, strip in found.items()}
