"""Influence over several processes under a matrix that is known by its products: all solve together.

The products of such a matrix may be collective, so every process solves for the queries of all, one load after the
other, each time with the same vectors; then each scores its own training examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.attribution.found import Influence
from nngeom.attribution.over_processes import divided, joined
from nngeom.attribution.queries import Queries, cut
from nngeom.attribution.scoring import Question
from nngeom.core.errors import ArgumentError, RankMismatchError
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.weighted import pieces
from nngeom.fmat.side import Side
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.implicit_inverse import ImplicitInverse
from nngeom.pmat.metric import ByBlock, Metric
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.sharded import PMatSharded
from nngeom.ranks.team import Team
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import require_examples


def over_products(run: Run, queries: Any, question: Question, out: Any) -> Influence:
    """The influence of the training examples of all processes on the queries of all, whole on each.

    Raises :class:`ArgumentError` for ``out``, as for such a matrix in one process, and :class:`RankMismatchError` where
    the matrices of the processes are not the same.
    """
    if out is not None:
        question.metric.stored  # noqa: B018
    team, metric = run.team, question.metric
    with team.together("batches"):
        run = run.held()
        side = question.side(run, queries)
    alone, places = divided(run)
    room = max(1, alone.memory_budget // 2 // (metric.collection.numel * metric.dtype.itemsize))
    scores = question.scores(alone, side) if alone.loader else None
    held: list[Queries] = []

    def score() -> None:
        with team.together("influence"):
            if scores is not None and held:
                scores.against(held)
        held.clear()

    with alone.within():
        for part in solutions(metric, side, team, room):
            if sum(other.examples for other in held) + part.examples > room:
                score()
            held.append(part)
        score()
        return joined(question, places, alone.network.device, lambda: None if scores is None else scores.kept(None))


@dataclass(frozen=True)
class Solved:
    """Queries from ``start`` on, their gradients times a ``metric`` of one block: ``rows [1, q, 1, 1, d]``."""

    metric: Metric
    rows: FullJacobian
    start: int

    @property
    def examples(self) -> int:
        """How many."""
        return self.rows.shape[1]

    @property
    def place(self) -> slice:
        """Which queries."""
        return slice(self.start, self.start + self.examples)

    def pairs(
        self, theirs: ByBlock, rights: dict[Layout, LayerJacobian]
    ) -> Iterator[tuple[Layout, LayerJacobian, LayerJacobian]]:
        """As :meth:`Queries.pairs`; there are no right halves but the rows themselves."""
        for layout, j in theirs[0].items():
            yield layout, self.rows, self.metric.whole_right(0, {layout: j})


def solutions(metric: Metric, side: Side, team: Team, room: int) -> Iterator[Solved]:
    """The queries of all processes in rank order, of which a ``side`` has this one's, at most ``room`` at a time; all
    processes exhaust it. Raises :class:`LoaderError` where there are none.
    """
    start = 0
    for source in range(team.size):
        own = gradients(metric, side, room) if team.rank == source else iter(())
        while True:
            with team.together("queries") as note:
                rows = next(own, None)
                note.mine = None if rows is None else len(rows)
            count = note.all[source]
            if count is None:
                break
            if rows is None:
                rows = torch.empty(count, metric.collection.numel, dtype=metric.dtype, device=side.device)
            team.spread([rows], source)
            yield Solved(metric, FullJacobian(times(metric, rows, team)[None, :, None, None]), start)
            start += count
    require_examples(start)


def gradients(metric: Metric, side: Side, room: int) -> Iterator[Tensor]:
    """The gradients of the queries of a ``side``, ``[q, d]``, at most ``room`` at a time."""
    for group in side.groups():
        for chunk in group.chunks:
            for lo in range(0, chunk.examples, room):
                some = cut(chunk, lo, min(lo + room, chunk.examples))
                yield metric.whole_right(0, metric.by_block(some.jacobians)[0]).matrix()[0, :, 0, 0].contiguous()


def times(metric: Metric, rows: Tensor, team: Team) -> Tensor:
    """``M x`` of the same ``rows [q, d]`` on all processes, rank 0's; raises :class:`RankMismatchError` where others
    have another matrix.
    """
    own = torch.empty_like(rows)
    with team.together("solve"):  # whose products may be made together
        for lo, hi in pieces(FullJacobian(rows[None, :, None, None])):
            own[lo:hi] = metric.times(rows[lo:hi])
    first = own.clone()
    team.spread([first], 0)
    with team.together("solve"):
        if float((first - own).norm()) > torch.finfo(own.dtype).eps ** 0.5 * float(first.norm()):
            raise RankMismatchError(
                f"the matrix of rank {team.rank} has other products than that of rank 0, with the same vectors; "
                "expected the same matrix on all processes"
            )
    return first


def require_team(matrix: ParameterOperator, team: Team) -> None:
    """Raise :class:`ArgumentError` where the products of a ``matrix`` are made by other processes than those of the
    ``team``.
    """
    operator = matrix.operator if isinstance(matrix, ImplicitInverse) else matrix
    theirs = operator.run.team if isinstance(operator, PMatImplicit) else None
    theirs = operator.team if isinstance(operator, PMatSharded) else theirs
    if theirs is not None and theirs.size > 1 and team.size > 1 and theirs.ranks != team.ranks:
        raise ArgumentError(
            f"the matrix is one of ranks {theirs.ranks}, whose products these make together, and process_group holds "
            f"ranks {team.ranks}; expected the same"
        )
