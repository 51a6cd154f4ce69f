"""Influence: how much every training example would change a loss, to first order, if it had more weight."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

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
from nngeom.fmat.store import FileStore
from nngeom.fmat.tiles import Side, require_finite
from nngeom.pmat.metric import Metric, require_matrix
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.pmat import PMat
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Chunk, Policy, Sweep


@dataclass(frozen=True)
class Influence:
    """Scores of ``n`` training examples for ``q`` queries, in the order of both loaders.

    ``scores (q, n)``: ``g_j^T (matrix + damping)^-1 g_i``, without sign and without ``1/n``; ``None`` with ``top=``.
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
    in half the memory budget; rows of training examples stay in factored form.

    Args:
        train: the training data, as for any measure; with targets.
        queries: the data whose losses are explained, likewise.
        matrix: over the parameters; its ``inverse(damping)`` is taken here.
        loss: of the training examples, and of the queries unless they have a function of their own.
        damping: added to the matrix, as for its ``inverse``; nothing by default.
        query_function: ``(outputs, targets) -> (q,)``, where queries are no losses: a logit, a margin, a probability.
        top: keep the so many largest scores of each query only, all if there are fewer, as they stream by.
        by_layer: whether the share of each layer is kept too.
        out: a path; the scores are written to the ``.npy`` file ``path`` as for :func:`GramMatrix`.

    Raises :class:`SingularError` where the damped matrix is singular or indefinite, :class:`ArgumentTypeError`,
    :class:`CollectionError`, :class:`DeviceError` for what is no matrix of this model, :class:`ArgumentError` for
    options that do not go together, and what any measure raises. Source: Koh & Liang 2017, eq. 2; Grosse et al. 2023.
    """
    require_matrix(matrix, "matrix")
    _require_options(top, by_layer, out)
    run = Run.of(
        model,
        train,
        function=function,
        layer_collection=matrix.layer_collection,
        progress=progress,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
    )
    network = run.network
    inverse = matrix.inverse(0.0 if damping is None else damping)  # type: ignore[attr-defined]
    metric = Metric(inverse, network.collection, accumulation_dtype(network.dtype), network.device)
    policy = Policy("influence", part_of=metric.part_of, watch=False)
    cotangents = EmpiricalFisher(as_loss(loss, model))
    asked = cotangents if query_function is None else QueryFunction(_callable(query_function))
    with run.within():
        side = Side.of(run.silent().on(queries), asked, policy)
        sweep = Sweep(run, cotangents, replace(policy, divide=True, reuse=True, shares=4)).held()
        if out is None:
            layers = network.layer_of if by_layer else None
            return _Scores(metric, side, sweep, Everything() if top is None else Largest(top), layers).influence()
        return _in_file(out, metric, side, replace(sweep, run=sweep.run.held()))


def _require_options(top: Any, by_layer: bool, out: Any) -> None:
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
    if not isinstance(metric.matrix, PMat):
        raise ArgumentError(
            f"out= knows a matrix again by what it holds, and a {type(metric.matrix).__name__} holds nothing; expected "
            "a stored matrix, or no out="
        )
    with FileStore(out) as store:
        about = Fingerprint.of(side, Side(sweep), centered=False, metric=metric.matrix)
        there = store.begin((side.examples, sum(sweep.run.sizes)), metric.dtype, about)
        computed = _Scores(metric, side, sweep, InFile(store), None, known=there is not None)
        own = computed.over_all()
        return Influence((store.result() if there is None else there)[""], own, None, None, {})


@dataclass
class _Scores:
    """One computation: the training set gone through once for every load of queries."""

    metric: Metric
    side: Side
    sweep: Sweep
    keeper: Keeper
    layer_of: Callable[[str], str] | None
    known: bool = False  # all scores are there, only those of the examples for themselves are wanted

    def influence(self) -> Influence:
        """What is kept of the scores."""
        layers: dict[str, Everything] = {}
        own = self.over_all(layers)
        by_layer = {name: kept.result() for name, kept in layers.items()}
        if isinstance(self.keeper, Largest):
            return Influence(None, own, *self.keeper.result(), {})
        return Influence(self.keeper.result(), own, None, None, by_layer)  # type: ignore[attr-defined]

    def over_all(self, layers: dict[str, Everything] | None = None) -> Tensor | None:
        """Every load of queries against all training examples; returns the scores of these for themselves."""
        own: list[Tensor] = []
        wanted = isinstance(self.metric.matrix, PMat)
        for load in self._loads():
            for chunk in self.sweep.chunks():
                self._chunk(load, chunk, own if wanted else None, layers)
            wanted = False
        return torch.cat(own) if own else None

    def _loads(self) -> Iterator[list[Part]]:
        if self.known:
            yield []
        else:
            yield from loads(self.side, self.metric, self.sweep.run.memory_budget // 2)

    def _chunk(
        self, load: list[Part], chunk: Chunk, own: list[Tensor] | None, layers: dict[str, Everything] | None
    ) -> None:
        i = slice(chunk.start, chunk.start + chunk.examples)
        load = [part for part in load if not self.keeper.has(part.place, i)]
        theirs = self.metric.by_block(chunk.jacobians)
        rights = self._rights(theirs) if load or own is not None else {}
        if own is not None:
            own.append(self._own(theirs, rights, chunk.examples))
        for part in load:
            parts = self._parts(part, theirs, rights, chunk.examples)
            total = sum(parts.values()) if self.layer_of is not None else parts[""]
            require_finite([total], self.side, Side(self.sweep))
            self.keeper.keep(part.place, i, total)  # type: ignore[arg-type]
            for name, scores in parts.items() if layers is not None and self.layer_of is not None else ():
                layers.setdefault(name, Everything()).keep(part.place, i, scores)

    def _rights(self, theirs: dict[int, dict[Layout, LayerJacobian]]) -> dict[Layout, LayerJacobian]:
        rows = {layout: j for some in theirs.values() for layout, j in some.items()}
        own = {layout: j for layout, j in rows.items() if self.metric.own(layout) is not None}
        return {layout: self.metric.right(layout, j) for layout, j in own.items()}

    def _parts(self, part: Part, theirs: Any, rights: dict[Layout, LayerJacobian], n: int) -> dict[str, Tensor]:
        """``{layer: (q, n)}``, or ``{"": (q, n)}`` of all."""
        q, like = part.chunk.examples, {"dtype": self.metric.dtype, "device": self.side.device}
        names = self.metric.collection.by_layer() if self.layer_of is not None else ("",)
        out = {name: torch.zeros(q, n, **like) for name in names}
        for layout, left, right in part.pairs(theirs, rights):
            add_scores(out["" if self.layer_of is None else self.layer_of(layout.names[0])], left, right)
        return out

    def _own(self, theirs: Any, rights: dict[Layout, LayerJacobian], n: int) -> Tensor:
        """``(n,)``: the scores of a chunk of training examples for themselves."""
        total = torch.zeros(n, dtype=self.metric.dtype, device=self.side.device)
        for b, rows in theirs.items():
            if self.metric.meet(rows, rows):
                for layout, j in rows.items():
                    total += paired(self.metric.left(layout, j), rights[layout])[0]
            else:
                total += paired(self.metric.whole_left(b, rows), self.metric.whole_right(b, rows))[0]
        require_finite([total], Side(self.sweep))
        return total
