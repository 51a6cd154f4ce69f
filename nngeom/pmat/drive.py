"""A recipe driven over data: the means of the statistics it asks for, one sweep each, until it gives its blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar, cast

import torch

from nngeom.core.errors import NonFiniteError, UnsupportedError
from nngeom.core.finite import all_finite
from nngeom.core.layout import Layout
from nngeom.core.statistic import Sums, names_of
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Means, Recipe, Selection, Statistic
from nngeom.pmat.representation import Representation
from nngeom.ranks.data import warn_of_same
from nngeom.ranks.merged import Header, alike, merged
from nngeom.ranks.team import ALONE, Team
from nngeom.space.collection import LayerCollection
from nngeom.sweep.checkpoint import Checkpoint
from nngeom.sweep.chunk import added
from nngeom.sweep.resumed import Resumed
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Chunk, Sweep, require_examples

M = TypeVar("M", bound=PMat)


class Source(Protocol):
    """What a recipe is driven over."""

    @property
    def run(self) -> Run | None:
        """The model, this process's data, and the processes it is split over; ``None`` for rows at hand."""

    def chunks(self) -> Iterator[Chunk]:
        """One pass over the data; a chunk may be overwritten when the next is asked for."""

    def restart(self) -> None:
        """Forget what is kept of the first pass: the next is over the data."""

    def raise_where_not_finite(self) -> None:
        """Raise :class:`NonFiniteError` that says which batch and examples are not finite, if some are not."""


class Repeated:
    """Several passes of one sweep: the later ones from memory where the first one fits it, else over the data again.

    Rows are not searched for NaN and infinity: for a result that is not finite ask :meth:`raise_where_not_finite`.
    """

    def __init__(self, sweep: Sweep, count: int) -> None:
        self.sweep = sweep.held().but(watch=False)
        self._several = count > 1
        self.restart()

    @property
    def run(self) -> Run:
        """The model, this process's data, and the processes it is split over."""
        return self.sweep.run

    def chunks(self) -> Iterator[Chunk]:
        """One pass."""
        if self._kept:
            return iter(self._kept)
        return self._first() if self._keep else self.sweep.but(reuse=True).chunks()

    def _first(self) -> Iterator[Chunk]:
        self._keep = False
        kept: list[Chunk] | None = []
        room, held = self.sweep.run.memory_budget, set[int]()
        for chunk in self.sweep.chunks():
            if kept is not None:
                room -= chunk.nbytes(held)
                kept = None if room < 0 else [*kept, chunk]
            yield chunk
        self._kept = kept or []

    def restart(self) -> None:
        """Forget what is kept of the first pass: the next is over the data."""
        self._keep, self._kept = self._several, list[Chunk]()

    def raise_where_not_finite(self) -> None:
        """Raise for the first batch with outputs or gradients that are not finite, if there is one."""
        self.sweep.raise_where_not_finite()


class Resumable(Repeated):
    """The same with the sums of every pass kept in the folder of a ``checkpoint``, and taken up from there."""

    def __init__(self, sweep: Sweep, checkpoint: Checkpoint) -> None:
        super().__init__(sweep, 1)  # rows of a pass that is taken up are not all at hand for the next
        self._checkpoint, self._passes = checkpoint, 0

    def sums(self, statistic: Statistic) -> Sums:
        """Those of the next pass."""
        path = self._checkpoint.path(self._passes)
        self._passes += 1
        return Resumed(self._checkpoint, path, self.sweep, statistic).sums()


def drive(recipe: Recipe, source: Source) -> tuple[dict[Layout, Any], int]:
    """The blocks of a recipe, and the number of examples.

    Raises :class:`LoaderError` where there is none, :class:`NonFiniteError` where a mean is not finite.
    """
    statistic = next(recipe)
    while True:
        sums = summed(statistic, source)
        count = require_examples(sums.count)
        means = require_finite(one_dtype(sums.mean(used_up=True)), source, count)
        try:
            statistic = recipe.send(means)
        except StopIteration as end:
            return end.value, count


def summed(statistic: Statistic, source: Source) -> Sums:
    """The sums of a statistic over all examples, those of all processes.

    Where a layer is used differently on one of these, its parameters are left to the fallback on all, and the data is
    gone over once more.
    """
    run = source.run
    sums, headers = _local(statistic, source)
    if run is None:
        return sums
    team, left = run.team, run.left_to_fallback
    if not alike(headers):
        both = set[str]().union(*team.exchange("structure", left))
        if any(team.exchange("structure", both != left)):
            left |= both
            source.restart()
            sums, headers = _local(statistic, source)
    return merged(sums, team, headers, run.network.device)


def _local(statistic: Statistic, source: Source) -> tuple[Sums, list[Header]]:
    """This process's sums, and what all say of theirs."""
    run, team = source.run, team_of(source)
    with team.together("sweep") as note:
        sums = source.sums(statistic) if isinstance(source, Resumable) else added(Sums(), statistic, source.chunks())
        header = Header.of(sums) if team.size > 1 else Header(sums.count, "")
        note.mine = header, None if run is None else run.met.get(0)
    warn_of_same([(met, header.count) for header, met in note.all])
    return sums, [header for header, _ in note.all]


def team_of(source: Source) -> Team:
    """The processes over which the examples of a source are split."""
    return ALONE if source.run is None else source.run.team


def built(chosen: Representation[M], collection: LayerCollection, source: Source) -> M:
    """The matrix of a representation, driven over data."""
    blocks, count = drive(chosen.recipe(Selection.of(collection, team_of(source))), source)
    return cast(M, chosen.kind.of_blocks(collection, blocks, count))


def finished(recipe: Recipe, means: Means) -> dict[Layout, Any]:
    """The blocks of a recipe that is sent the last means it asked for; raises :class:`UnsupportedError` for others."""
    try:
        recipe.send(means)
    except StopIteration as end:
        blocks: dict[Layout, Any] = end.value
        return blocks
    raise UnsupportedError(
        "a representation of several sweeps is not estimated from random probes; use one of a single sweep"
    )


def one_dtype(means: Means) -> Means:
    """The widest dtype of all for each: layers of a model may differ."""
    dtypes = {t.dtype for tensors in means.values() for t in tensors.values()}
    if len(dtypes) < 2:
        return means
    wide = functools.reduce(torch.promote_types, dtypes)
    return {block: {name: t.to(wide) for name, t in tensors.items()} for block, tensors in means.items()}


def require_finite(means: Means, source: Source, count: int) -> Means:
    """The means, or :class:`NonFiniteError` that says what is not finite."""
    odd = not_finite(means)
    if odd is not None:
        with team_of(source).together("sweep"):
            source.raise_where_not_finite()
        raise overflowed(odd, count)
    return means


def not_finite(means: Means) -> str | None:
    """The first statistic that is not finite, in words."""
    if all_finite([t for tensors in means.values() for t in tensors.values()]):
        return None
    each = ((block, name, t) for block, tensors in means.items() for name, t in tensors.items())
    return next((f"{name!r} of {names_of(block)[:4]}" for block, name, t in each if not all_finite([t])), None)


def overflowed(statistic: str, count: int) -> NonFiniteError:
    """What is raised of one that is not finite, of rows that are."""
    return NonFiniteError(
        f"the statistic {statistic} overflowed to NaN or infinity over {count} examples; scale the inputs or use a "
        "wider dtype, model.double()"
    )
