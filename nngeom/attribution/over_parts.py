"""Influence under a matrix whose parts lie in files: one part in memory at a time, each a sweep over the training data.

A score is a sum over layers, so that of all parameters is the sum of those through the parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from nngeom.attribution.found import Influence
from nngeom.core.errors import LoaderError
from nngeom.pmat.in_files import PMatInFiles
from nngeom.sweep.watched import Watched


def over_parts(
    of_part: Callable[..., Influence],
    matrix: PMatInFiles,
    damping: Any,
    loaders: tuple[Any, Any],
    top: int | None,
) -> Influence:
    """The sum of ``of_part(part, damping, train, queries)`` over the parts of a matrix, and the ``top`` scores of it.

    Raises :class:`LoaderError` where one of the ``loaders``, of training examples and of queries, gives other batches,
    or others first, in a later pass.
    """
    train, queries = (Watched(loader, ordered=True) for loader in loaders)
    chosen = matrix.dampings(0.0 if damping is None else damping)
    found: list[Influence] = []
    for collection, part in matrix.read():
        found.append(of_part(part, chosen(collection), train, queries))
        if max(len(train.seen), len(queries.seen)) > 1:
            raise LoaderError(
                "a loader gives other batches every time it is gone through, and the scores of all parts of the matrix "
                "must be of the same examples; expected shuffle=False, or list(loader)"
            )
    total = functools.reduce(_sum, found)
    if top is None or total.scores is None:
        return total
    values, indices = total.scores.topk(min(top, total.scores.shape[1]), 1)
    return Influence(None, total.self_scores, values, indices, {})


def _sum(x: Influence, y: Influence) -> Influence:
    """Scores through the parameters of both."""
    scores, own = _plus(x.scores, y.scores), _plus(x.self_scores, y.self_scores)
    return Influence(scores, own, None, None, {**x.by_layer, **y.by_layer})


def _plus(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return None if x is None or y is None else x + y
