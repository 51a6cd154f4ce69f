"""What influence is told by: scores, or the largest of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Influence:
    """Scores of ``n`` training examples for ``q`` queries, in the order of both loaders.

    ``scores (q, n)``: ``g_j^T (matrix + damping)^-1 g_i``, without sign and without ``1/n``; ``None`` with ``top=``;
    of every position ``(q, n, t)`` with ``by_position=True``.
    ``values``, ``indices (q, k)``: with ``top=k`` the largest of each query in descending order, and their examples;
    else ``None``. ``self_scores (n,)``: of every training example for itself; ``None`` under a matrix that is known by
    its products alone, where each costs a solve. ``by_layer``: ``{layer: (q, n)}``, which sum to the scores; empty
    unless asked for.
    """

    scores: Tensor | None
    self_scores: Tensor | None
    values: Tensor | None
    indices: Tensor | None
    by_layer: dict[str, Tensor]
