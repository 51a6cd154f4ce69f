"""The scores of training examples for queries, as they are computed: which are asked for, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nngeom.attribution.found import Influence
from nngeom.attribution.queries import Part, Queries, loads
from nngeom.attribution.scores import Everything, InFile, Keeper, Largest, add_scores
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.paired import paired
from nngeom.fmat.fingerprint import Fingerprint
from nngeom.fmat.positions import Positions
from nngeom.fmat.side import Side
from nngeom.fmat.store import FileStore, Store
from nngeom.fmat.tiles import require_finite
from nngeom.pmat.metric import ByBlock, Metric
from nngeom.pmat.pmat import PMat
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Chunk, Policy, Sweep


@dataclass(frozen=True)
class Question:
    """What is asked: scores under a ``metric`` of training examples by their ``loss``, for queries by what is ``asked``
    of them; of each the ``top`` ones, or all, ``by_layer`` or ``by_position``.
    """

    metric: Metric
    loss: Cotangents
    asked: Cotangents
    top: int | None = None
    by_layer: bool = False
    by_position: bool = False

    def told(self) -> dict[str, Any]:
        """All but the matrix, to be compared."""
        asked = {"loss": self.loss, "queries": self.asked, "top": self.top}
        return {**asked, "by_layer": self.by_layer, "by_position": self.by_position}

    def side(self, run: Run, queries: Any) -> Side:
        """The ``queries``, of this process."""
        policy = Policy("influence", part_of=self.metric.part_of, watch=False)
        return Side.of(run.silent().on(queries), self.asked, policy)

    def scores(self, run: Run, side: Side, store: Store | None = None) -> Scores:
        """Of the training examples of a ``run`` for the queries of a ``side``, to be computed; in a ``store`` if there
        is one.
        """
        policy = replace(side.sweep.policy, divide=True, reuse=True, shares=4, apart=self.by_position)
        sweep = Sweep(run, self.loss, policy).held()
        layers = run.network.layer_of if self.by_layer else None
        keeper = InFile(store) if store is not None else Everything() if self.top is None else Largest(self.top)
        return Scores(self.metric, side, sweep, keeper, layers, apart=Positions() if self.by_position else None)


@dataclass
class Scores:
    """One computation: the training set gone through once for every load of queries."""

    metric: Metric
    side: Side
    sweep: Sweep
    keeper: Keeper
    layer_of: Callable[[str], str] | None = None
    apart: Positions | None = None  # positions of training examples have scores of their own
    known: bool = False  # all scores are there, only those of the examples for themselves are wanted
    layers: dict[str, Everything] = field(default_factory=dict)

    def influence(self) -> Influence:
        """What is kept of the scores."""
        return self.kept(self.over_all())

    def kept(self, own: Tensor | None) -> Influence:
        """What is kept of the scores that are computed; ``own``: those of training examples for themselves."""
        by_layer = {name: self._by_position(kept.result()) for name, kept in self.layers.items()}
        if isinstance(self.keeper, Largest):
            return Influence(None, own, *self.keeper.result(), by_layer)
        return Influence(self._by_position(self.keeper.result()), own, None, None, by_layer)

    def fingerprint(self) -> Fingerprint:
        """Of queries and training examples, whose batches are held from now on."""
        self.sweep = replace(self.sweep, run=self.sweep.run.held())
        return Fingerprint.of(self.side, Side(self.sweep), centered=False, metric=self.metric.stored)

    def in_file(self, store: FileStore, about: Fingerprint) -> Influence:
        """The scores of a file that is ``about`` these, computed unless they are there."""
        there = store.begin((self.side.examples, sum(self.sweep.run.sizes)), self.metric.dtype, about)
        if there is None:
            return self.influence()
        self.known = True
        return Influence(there[""], self.over_all(), None, None, {})

    def _by_position(self, scores: Tensor) -> Tensor:
        return scores if self.apart is None else scores.unflatten(1, (-1, self.apart.count or 1))

    def over_all(self) -> Tensor | None:
        """Every load of queries against all training examples; returns the scores of these for themselves."""
        own: list[Tensor] = []
        wanted = isinstance(self.metric.matrix, PMat)
        for load in self._loads():
            own += self.against(load, own=wanted)
            wanted = False
        return torch.cat(own) if own else None

    def against(self, load: Sequence[Queries], *, own: bool = False) -> list[Tensor]:
        """One load of queries against all training examples; the scores of these for themselves, where ``own`` ones are
        wanted.
        """
        found: list[Tensor] = []
        if sum(part.examples for part in load) < self.side.examples and not self.known:
            self.sweep = self.sweep.but(reread=False).held()  # a loader that shuffles must not do so between loads
        for chunk in self.sweep.chunks():
            rows = self.metric.by_block(chunk.jacobians)
            halves = self._halves(rows)
            if own:
                found.append(self._own(rows, halves, chunk.examples))
            if self.apart is not None:
                chunk = self.apart.taken_apart(chunk)
                rows = self.metric.by_block(chunk.jacobians)
                halves = self._halves(rows)
            self._add(load, chunk, rows, {layout: right for layout, (_, right) in halves.items()})
        return found

    def _loads(self) -> Iterator[list[Part]]:
        if self.known:
            yield []
        else:
            yield from loads(self.side, self.metric, self.sweep.run.memory_budget // 2)

    def _halves(self, rows: ByBlock) -> dict[Layout, tuple[LayerJacobian, LayerJacobian]]:
        """Both halves of the products with a chunk, where it has them layout by layout."""
        every = {layout: j for some in rows.values() for layout, j in some.items()}
        return {lay: self.metric.both(lay, j) for lay, j in every.items() if self.metric.own(lay) is not None}

    def _add(self, load: Sequence[Queries], chunk: Chunk, rows: ByBlock, rights: dict[Layout, LayerJacobian]) -> None:
        """The scores of a chunk of training examples for a load of queries."""
        i = slice(chunk.start, chunk.start + chunk.examples)
        for part in load:
            if self.keeper.has(part.place, i):
                continue
            shares = self._shares(part, rows, rights, chunk.examples)
            total = torch.stack(list(shares.values())).sum(0) if len(shares) > 1 else next(iter(shares.values()))
            require_finite([total], self.side, Side(self.sweep))
            self.keeper.keep(part.place, i, total)
            for name, scores in shares.items() if self.layer_of is not None else ():
                self.layers.setdefault(name, Everything()).keep(part.place, i, scores)

    def _shares(self, part: Queries, rows: ByBlock, rights: dict[Layout, LayerJacobian], n: int) -> dict[str, Tensor]:
        """``{layer: (q, n)}``, or ``{"": (q, n)}`` of all."""
        names = [""] if self.layer_of is None else list(self.metric.collection.by_layer())
        out = {name: self._zeros(part.examples, n) for name in names}
        for layout, left, right in part.pairs(rows, rights):
            add_scores(out["" if self.layer_of is None else self.layer_of(layout.names[0])], left, right)
        return out

    def _own(self, rows: ByBlock, halves: dict[Layout, tuple[LayerJacobian, LayerJacobian]], n: int) -> Tensor:
        """``(n,)``: the scores of a chunk of training examples for themselves."""
        total = self._zeros(n)
        for b, some in rows.items():
            if self.metric.meet(some, some):
                total += torch.stack([paired(*halves[layout])[0] for layout in some]).sum(0)
            else:
                total += paired(self.metric.whole_left(b, some), self.metric.whole_right(b, some))[0]
        require_finite([total], Side(self.sweep))
        return total

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.metric.dtype, device=self.side.device)
