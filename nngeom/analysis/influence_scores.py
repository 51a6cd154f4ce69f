"""Do scores of influence tell what training without some of the examples would have given?

Two judges, both from models that were trained anew: on random subsets, or on all examples but one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError

DRAWS = 1000  # resamplings of the queries


@dataclass(frozen=True)
class ScoreQuality:
    """Rank correlations of predicted and measured losses: ``by_query (q,)``, in [-1, 1], NaN where all of a query's
    predictions or losses are equal; ``mean`` of the others, with the ``interval (2,)`` of 95 percent of the means of
    resampled queries.
    """

    mean: Tensor
    by_query: Tensor
    interval: Tensor


def linear_datamodeling_score(
    scores: Tensor, losses_of_subsets: Tensor, subsets: Tensor, generator: torch.Generator | None = None
) -> ScoreQuality:
    """The linear datamodelling score: over subsets of the training set, the Spearman correlation of the sum of the
    ``scores`` of their examples with minus the loss of models trained on them, query by query.

    ``scores (q, n)``: larger where an example lowers a query's loss, as those of :func:`nngeom.influence` are.
    ``losses_of_subsets (m, q)``: the query's loss under models trained on each subset (averaged over several seeds,
    which matters). ``subsets (m, n)``: booleans, which examples each subset has. ``generator``: of the resampled
    queries behind ``interval`` (a fixed seed by default).

    Raises :class:`ArgumentError` for shapes that do not fit, fewer than three subsets, or numbers that are not finite.
    Source: Park et al. 2023, eq. 4.
    """
    scores = _finite(scores, "scores", 2)
    losses = _finite(losses_of_subsets, "losses_of_subsets", 2)
    if not isinstance(subsets, Tensor) or subsets.ndim != 2 or subsets.dtype != torch.bool:
        given = f"{subsets.dtype} {tuple(subsets.shape)}" if isinstance(subsets, Tensor) else type(subsets).__name__
        raise ArgumentError(f"subsets are {given}; expected booleans (m, n), which examples each subset has")
    (q, n), m = scores.shape, len(subsets)
    if subsets.shape[1] != n or losses.shape != (m, q):
        raise ArgumentError(
            f"scores are {tuple(scores.shape)}, losses_of_subsets {tuple(losses.shape)}, subsets "
            f"{tuple(subsets.shape)}; expected (q, n), (m, q) and (m, n)"
        )
    predicted = subsets.to(scores) @ scores.T
    return _quality(predicted.T, -losses.T.to(predicted), "subsets", generator)


def leave_one_out(
    scores: Tensor,
    losses_without: Tensor,
    examples: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> ScoreQuality:
    """The same with single removals: the Spearman correlation, query by query, of ``scores (q, n)`` with the loss of
    models trained without each example.

    ``losses_without (r, q)``: of models trained without the example ``examples[r]``; by default ``examples`` are all of
    them in order, ``r = n``. Removing example ``i`` changes a loss by ``+scores[j, i] / n`` to first order. Seeds
    easily change losses by more: average over several. ``generator``, results and errors as for
    :func:`linear_datamodeling_score`. Source: Koh & Liang 2017, section 4.1.
    """
    scores = _finite(scores, "scores", 2)
    losses = _finite(losses_without, "losses_without", 2)
    q, n = scores.shape
    index = torch.arange(n, device=scores.device) if examples is None else _indices(examples, n)
    if losses.shape != (len(index), q):
        raise ArgumentError(
            f"scores are {tuple(scores.shape)} and losses_without {tuple(losses.shape)}; expected (q, n) and "
            f"({len(index)}, q), one row an example that was left out"
        )
    return _quality(scores[:, index], losses.T.to(scores), "removals", generator)


def _finite(x: Any, name: str, ndim: int) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != ndim or not x.numel():
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(f"{name} are {given}; expected a tensor of {ndim} axes with entries")
    if not bool(torch.isfinite(x).all()):
        raise ArgumentError(f"{name} contain NaN or infinity; expected finite numbers")
    return x.detach().to(torch.float64)


def _indices(examples: Any, n: int) -> Tensor:
    if not isinstance(examples, Tensor) or examples.ndim != 1 or examples.is_floating_point():
        raise ArgumentTypeError("examples are no tensor of indices; expected whole numbers (r,), those left out")
    if examples.dtype == torch.bool or bool(((examples < 0) | (examples >= n)).any()):
        raise ArgumentError(f"examples are not all in 0 .. {n - 1}; expected indices of the training examples")
    return examples


def _quality(x: Tensor, y: Tensor, what: str, generator: torch.Generator | None) -> ScoreQuality:
    """Of predictions ``x`` and measurements ``y``, ``(q, m)``."""
    if x.shape[1] < 3:
        raise ArgumentError(f"{x.shape[1]} {what} have no rank correlation; expected at least three")
    by_query = _correlation(_ranks(x), _ranks(y))
    known = by_query[~by_query.isnan()].cpu()
    generator = generator or torch.Generator().manual_seed(0)
    if not len(known):
        nan = by_query.new_tensor(float("nan"))
        return ScoreQuality(nan, by_query, nan.expand(2))
    draws = torch.randint(len(known), (DRAWS, len(known)), generator=generator, device=generator.device).cpu()
    ends = known[draws].mean(1).quantile(known.new_tensor([0.025, 0.975]))
    return ScoreQuality(known.mean(), by_query, ends)


def _ranks(x: Tensor) -> Tensor:
    """Ranks along the last axis; equal values share the mean of theirs."""
    ordered = x.sort(-1).values.contiguous()
    first = torch.searchsorted(ordered, x.contiguous(), right=False)
    last = torch.searchsorted(ordered, x.contiguous(), right=True)
    return (first + last - 1).to(x) / 2


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's along the last axis; NaN where one side is constant."""
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
