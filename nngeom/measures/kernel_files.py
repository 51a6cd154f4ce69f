"""A kernel that is written to a file, or opened from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nngeom.fmat.dense import FMatDense
from nngeom.fmat.fingerprint import Fingerprint
from nngeom.fmat.places import Places
from nngeom.fmat.products import EVERYTHING, build
from nngeom.fmat.ring_file import fill
from nngeom.fmat.side import Side
from nngeom.fmat.store import FileStore
from nngeom.fmat.team_store import TeamStore
from nngeom.pmat.metric import Metric
from nngeom.ranks.team import Team


def in_file(
    out: Any,
    side: Callable[[Any], Side],
    loader: Any,
    other: Any,
    *,
    centered: bool,
    metric: Metric | None,
    progress: bool,
) -> FMatDense:
    """The kernel of a file, computed unless it is there; whether that can be written is known before any batch is
    read.
    """
    stored = None if metric is None else metric.stored
    with FileStore(out) as store:
        rows, columns = side(loader), None if other is None else side(other)
        about = Fingerprint.of(rows, columns, centered=centered, metric=stored)
        shape = FMatDense.sizes(rows.outputs, rows.examples, (columns or rows).examples)
        there = store.begin(shape, rows.kept, about)
        if there is not None:
            return FMatDense(there[""])
        how: dict[str, Any] = {"centered": centered, "metric": metric, "store": store, "progress": progress}
        return build(FMatDense, rows, columns, EVERYTHING, **how)[""]


def in_file_of_all(
    out: Any, side: Callable[[Any], Side], loader: Any, other: Any, team: Team, *, centered: bool, metric: Metric | None
) -> FMatDense:
    """The same of the examples of all processes of a ``team``, which write to one file."""
    stored = None if metric is None else metric.stored
    with TeamStore(out, team) as store:
        with team.together("batches"):
            rows, columns = side(loader), None if other is None else side(other)
        own = Places.of(rows)
        across = own if columns is None else Places.of(columns)
        with team.together("fingerprint") as note:
            note.mine = Fingerprint.of(rows, columns, centered=centered, metric=stored)
        split = {"processes": team.size, "examples of each": own.counts, "examples of other= of each": across.counts}
        shape = FMatDense.sizes(own.outputs, own.total, across.total)
        there = store.begin(shape, rows.kept, Fingerprint.over(note.all, **split))
        if there is None:
            fill(store, rows, columns, (own, across), centered=centered, metric=metric)
            there = store.result()
        return FMatDense(there[""])
