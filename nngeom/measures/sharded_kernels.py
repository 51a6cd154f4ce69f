"""A kernel of which every process keeps the rows of its own examples."""

from __future__ import annotations

from nngeom.fmat.dense import FMatDense
from nngeom.fmat.places import Places
from nngeom.fmat.products import EVERYTHING
from nngeom.fmat.ring import strips
from nngeom.fmat.sharded import FMatSharded
from nngeom.fmat.side import Side
from nngeom.pmat.metric import Metric


def sharded_kernel(rows: Side, columns: Side | None, *, centered: bool, metric: Metric | None) -> FMatSharded:
    """The strips of an ``FMatDense``, not gathered."""
    places = Places.of(rows)
    across = places if columns is None else Places.of(columns)
    found = strips(FMatDense, rows, columns, EVERYTHING, (places, across), centered=centered, metric=metric)
    return FMatSharded(found[""], places, across, columns is not None)
