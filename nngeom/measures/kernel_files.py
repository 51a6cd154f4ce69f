"""A kernel that is written to a file, or opened from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nngeom.fmat.dense import FMatDense
from nngeom.fmat.fingerprint import Fingerprint
from nngeom.fmat.products import EVERYTHING, build
from nngeom.fmat.side import Side
from nngeom.fmat.store import FileStore
from nngeom.pmat.metric import Metric


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
