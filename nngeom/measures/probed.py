"""A matrix from random probes of the outputs instead of all of them: which metric, and how it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from nngeom.core.errors import ArgumentError
from nngeom.core.statistic import Sums
from nngeom.core.stream import seed_of
from nngeom.cotangents.fisher import ExactFisher
from nngeom.cotangents.loss import GaussNewton
from nngeom.cotangents.probes import Probes
from nngeom.pmat.drive import Repeated, built, finished, one_dtype, require_finite
from nngeom.pmat.estimate import MatrixEstimate
from nngeom.pmat.implicit_fisher import implicit
from nngeom.pmat.recipe import Selection
from nngeom.pmat.representation import Representation
from nngeom.ranks.data import warn_of_same
from nngeom.ranks.merged import Header, merged
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.sweep import Chunk, Sweep, require_examples


def probed(
    cotangents: ExactFisher | GaussNewton, estimator: str | None, samples: int | None, generator: torch.Generator | None
) -> Cotangents:
    """The metric, or random probes of it."""
    if estimator is None:
        if samples is not None or generator is not None:
            raise ArgumentError(
                "samples= and generator= go with estimator='rademacher'; without it the measure is exact "
                "(FIM_MonteCarlo draws labels)"
            )
        return cotangents
    if estimator != "rademacher":
        raise ArgumentError(f"estimator is {estimator!r}; expected 'rademacher', or None for all outputs")
    count = require_samples(8 if samples is None else samples)
    return Probes(cotangents, count, seed_of(generator), count**-0.5)


def require_samples(samples: Any) -> int:
    """A number of draws; raises :class:`ArgumentError`."""
    if not isinstance(samples, int) or samples < 1:
        raise ArgumentError(f"samples is {samples!r}; expected a whole number of at least 1")
    return samples


def estimate(chosen: Representation[Any], sweep: Sweep) -> MatrixEstimate:
    """The matrix of every probe by itself, and of all, in one sweep; representations of several sweeps take their basis
    from a matrix of all first.
    """
    probes: Probes = sweep.cotangents  # type: ignore[assignment]
    collection = sweep.run.network.collection
    sweep = sweep.held()
    if chosen.passes > 1:
        chosen = chosen.last_sweep(built(chosen, collection, Repeated(sweep, chosen.passes)))
    sweep = replace(sweep, cotangents=replace(probes, scale=1.0)).but(reuse=True)
    recipes = [chosen.recipe(Selection.of(collection)) for _ in range(probes.count + 1)]
    statistics = [next(recipe) for recipe in recipes]
    draws = [Sums() for _ in range(probes.count)]
    team = sweep.run.team
    with team.together("sweep") as note:
        for chunk in sweep.chunks():
            for j, one in one_by_one(chunk):
                with torch.no_grad():
                    draws[j].add(statistics[j], one)
        note.mine = [Header.of(d) for d in draws], sweep.run.met.get(0)
    warn_of_same([(met, headers[0].count) for headers, met in note.all])
    for j, d in enumerate(draws):
        merged(d, team, [headers[j] for headers, _ in note.all], sweep.run.network.device)
    count = require_examples(draws[0].count)
    for other in draws[1:]:
        other.share_inputs(draws[0])  # taken once, for all
    means = [one_dtype(d.mean()) for d in draws]
    whole = require_finite(one_dtype(Sums().merge(draws).mean()), Repeated(sweep, 1), count)
    make = lambda blocks: chosen.kind.of_blocks(collection, blocks, count)
    *each, matrix = [make(finished(recipe, m)) for recipe, m in zip(recipes, (*means, whole))]
    return MatrixEstimate(matrix, tuple(each))


def one_by_one(chunk: Chunk) -> Iterator[tuple[int, Chunk]]:
    """Every cotangent of a chunk by itself, with its number."""
    lo, total = chunk.cotangents
    for j in range(next((x.shape[0] for x in chunk.jacobians.values()), 0)):
        yield (
            lo + j,
            replace(
                chunk,
                jacobians={lay: x.cotangents(j, j + 1) for lay, x in chunk.jacobians.items()},
                cotangents=(lo + j, total),
            ),
        )


def implicit_estimate(sweep: Sweep) -> MatrixEstimate:
    """Products with the mean over all probes, and with each."""
    matrix, probes = implicit(sweep), sweep.cotangents
    alone = [replace(probes, count=1, first=j, scale=1.0) for j in range(probes.count)]  # type: ignore[attr-defined, type-var]
    return MatrixEstimate(matrix, tuple(replace(matrix, sweep=replace(matrix.sweep, cotangents=m)) for m in alone))
