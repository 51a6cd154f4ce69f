"""Influence: how much every training example would change a loss, to first order, if it had more weight."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.attribution.found import Influence
from nngeom.attribution.over_parts import over_parts
from nngeom.attribution.queries import Part, QueryFunction, loads
from nngeom.attribution.scores import Everything, InFile, Keeper, Largest, add_scores
from nngeom.core.damping import Damping
from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.core.paired import paired
from nngeom.cotangents.loss import EmpiricalFisher, Loss, as_loss
from nngeom.fmat.fingerprint import Fingerprint
from nngeom.fmat.positions import Positions
from nngeom.fmat.side import Side
from nngeom.fmat.store import FileStore
from nngeom.fmat.tiles import require_finite
from nngeom.pmat.in_files import PMatInFiles
from nngeom.pmat.metric import ByBlock, Metric, require_matrix
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.pmat import PMat
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Chunk, Policy, Sweep


@torch.no_grad()
def influence(
    model: nn.Module,
    train: Any,
    queries: Any,
    matrix: ParameterOperator,
    *,
    loss: str | Loss | Callable[[Tensor, Any], Tensor],
    damping: float | Tensor | Damping | None = None,
    query_function: Callable[[Tensor, Any], Tensor] | None = None,
    top: int | None = None,
    by_layer: bool = False,
    by_position: bool = False,
    out: str | os.PathLike[str] | None = None,
    function: Callable[..., Tensor] | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
) -> Influence:
    """Influence of the examples of ``train`` on those of ``queries``: ``g_j^T (matrix + damping)^-1 g_i``.

    ``g`` are gradients of each example's ``loss`` (as for :func:`EmpiricalFIM`), of the parameters of ``matrix``: a
    Fisher, Gauss-Newton or Hessian matrix of the training loss in any representation. The gradients of the queries
    times the inverse are made once and the training set is gone through once, or once for as many queries as have room
    in half the memory budget; rows of training examples stay in factored form. Under a matrix of :func:`to_folder` the
    training set is gone through once a part, of which one is in memory at a time.

    Args:
        train: the training data, as for any measure; with targets.
        queries: the data whose losses are explained, likewise.
        matrix: over the parameters; its ``inverse(damping)`` is taken here.
        loss: of the training examples, and of the queries unless they have a function of their own.
        damping: added to the matrix, as for its ``inverse``; nothing by default.
        query_function: ``(outputs, targets) -> (q,)``, where queries are no losses: a logit, a margin, a probability.
        top: keep the so many largest scores of each query only, all if there are fewer, as they stream by.
        by_layer: whether the share of each layer is kept too.
        by_position: scores are of every position of the training examples, such as tokens, ``(q, n, t)``; they sum to
            those of the examples. Parameters whose rows do not keep positions raise :class:`StructureError`.
        out: a path; the scores are written to the ``.npy`` file ``path`` as for :func:`GramMatrix`.

    Raises :class:`SingularError` where the damped matrix is singular or indefinite, :class:`ArgumentTypeError`,
    :class:`CollectionError`, :class:`DeviceError` for what is no matrix of this model, :class:`ArgumentError` for
    options that do not go together, and what any measure raises. Source: Koh & Liang 2017, eq. 2; Grosse et al. 2023.
    """
    require_matrix(matrix, "matrix")
    _require_options(top, out, by_layer=by_layer)
    if by_position and (top is not None or out is not None):
        raise ArgumentError("by_position=True keeps all scores; expected neither top= nor out= with it")
    if isinstance(matrix, PMatInFiles):
        if out is not None:
            raise ArgumentError("scores of a matrix in files are sums over its parts; expected no out=")
        given: dict[str, Any] = {"loss": loss, "query_function": query_function, "function": function, "check": check}
        given |= {"by_layer": by_layer, "by_position": by_position, "progress": progress}
        given |= {"memory_budget": memory_budget, "process_group": process_group}
        of_part = lambda part, d, t, q: influence(model, t, q, part, damping=d, **given)
        return over_parts(of_part, matrix, damping, (train, queries), top)
    run = Run.gathering(
        model,
        train,
        function=function,
        layer_collection=matrix.layer_collection,
        progress=progress,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
    )
    run.require_alone("influence")
    network = run.network
    inverse = matrix.inverse(0.0 if damping is None else damping)
    metric = Metric(inverse, network.collection, accumulation_dtype(network.dtype), network.device)
    policy = Policy("influence", part_of=metric.part_of, watch=False)
    cotangents = EmpiricalFisher(as_loss(loss, model))
    asked = cotangents if query_function is None else QueryFunction(_callable(query_function))
    with run.within():
        side = Side.of(run.silent().on(queries), asked, policy)
        sweep = Sweep(run, cotangents, replace(policy, divide=True, reuse=True, shares=4)).held()
        if out is None:
            layers = network.layer_of if by_layer else None
            apart = Positions() if by_position else None
            keeper = Everything() if top is None else Largest(top)
            return _Scores(metric, side, sweep, keeper, layers, apart=apart).influence()
        return _in_file(out, metric, side, replace(sweep, run=sweep.run.held()))


def _require_options(top: Any, out: Any, *, by_layer: bool) -> None:
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ArgumentError(f"top is {top!r}; expected how many scores of each query to keep, at least 1, or None")
    if sum((top is not None, bool(by_layer), out is not None)) > 1:
        raise ArgumentError("top=, by_layer= and out= each say what becomes of the scores; expected one of them")


def _callable(query_function: Any) -> Callable[[Tensor, Any], Tensor]:
    if not callable(query_function):
        raise ArgumentTypeError(
            f"query_function is {type(query_function).__name__}; expected a function (outputs, targets) -> (q,), or "
            "None for the loss"
        )
    return query_function


def _in_file(out: Any, metric: Metric, side: Side, sweep: Sweep) -> Influence:
    """The scores of a file, computed unless they are there."""
    stored = metric.stored
    with FileStore(out) as store:
        about = Fingerprint.of(side, Side(sweep), centered=False, metric=stored)
        there = store.begin((side.examples, sum(sweep.run.sizes)), metric.dtype, about)
        computed = _Scores(metric, side, sweep, InFile(store), known=there is not None)
        if there is None:
            return computed.influence()
        return Influence(there[""], computed.over_all(), None, None, {})


@dataclass
class _Scores:
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
        own = self.over_all()
        by_layer = {name: self._by_position(kept.result()) for name, kept in self.layers.items()}
        if isinstance(self.keeper, Largest):
            return Influence(None, own, *self.keeper.result(), by_layer)
        return Influence(self._by_position(self.keeper.result()), own, None, None, by_layer)

    def _by_position(self, scores: Tensor) -> Tensor:
        return scores if self.apart is None else scores.unflatten(1, (-1, self.apart.count or 1))

    def over_all(self) -> Tensor | None:
        """Every load of queries against all training examples; returns the scores of these for themselves."""
        own: list[Tensor] = []
        wanted = isinstance(self.metric.matrix, PMat)
        for load in self._loads():
            if sum(part.chunk.examples for part in load) < self.side.examples and not self.known:
                self.sweep = self.sweep.but(reread=False).held()  # a loader that shuffles must not do so between loads
            for chunk in self.sweep.chunks():
                rows = self.metric.by_block(chunk.jacobians)
                halves = self._halves(rows)
                if wanted:
                    own.append(self._own(rows, halves, chunk.examples))
                if self.apart is not None:
                    chunk = self.apart.taken_apart(chunk)
                    rows = self.metric.by_block(chunk.jacobians)
                    halves = self._halves(rows)
                self._add(load, chunk, rows, {layout: right for layout, (_, right) in halves.items()})
            wanted = False
        return torch.cat(own) if own else None

    def _loads(self) -> Iterator[list[Part]]:
        if self.known:
            yield []
        else:
            yield from loads(self.side, self.metric, self.sweep.run.memory_budget // 2)

    def _halves(self, rows: ByBlock) -> dict[Layout, tuple[LayerJacobian, LayerJacobian]]:
        """Both halves of the products with a chunk, where it has them layout by layout."""
        every = {layout: j for some in rows.values() for layout, j in some.items()}
        return {lay: self.metric.both(lay, j) for lay, j in every.items() if self.metric.own(lay) is not None}

    def _add(self, load: list[Part], chunk: Chunk, rows: ByBlock, rights: dict[Layout, LayerJacobian]) -> None:
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

    def _shares(self, part: Part, rows: ByBlock, rights: dict[Layout, LayerJacobian], n: int) -> dict[str, Tensor]:
        """``{layer: (q, n)}``, or ``{"": (q, n)}`` of all."""
        names = [""] if self.layer_of is None else list(self.metric.collection.by_layer())
        out = {name: self._zeros(part.chunk.examples, n) for name in names}
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
