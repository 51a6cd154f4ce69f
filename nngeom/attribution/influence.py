"""Influence: how much every training example would change a loss, to first order, if it had more weight."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.attribution.found import Influence
from nngeom.attribution.over_parts import over_parts
from nngeom.attribution.over_processes import over_processes
from nngeom.attribution.over_products import over_products, require_team
from nngeom.attribution.queries import QueryFunction
from nngeom.attribution.scoring import Question
from nngeom.core.damping import Damping
from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.linalg import accumulation_dtype
from nngeom.cotangents.loss import EmpiricalFisher, Loss, as_loss
from nngeom.fmat.store import FileStore
from nngeom.pmat.in_files import PMatInFiles
from nngeom.pmat.metric import Metric, require_matrix
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.pmat import PMat
from nngeom.sweep.agreement import agree
from nngeom.sweep.run import Run


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
    options that do not go together, and what any measure raises. Over the processes of ``process_group`` both sets are
    split, in rank order: each scores its own training examples for the queries of all, and all have the result. Where
    products of the matrix are collective they are so over the same processes.

    Source: Koh & Liang 2017, eq. 2; Grosse et al. 2023.
    """
    require_matrix(matrix, "matrix")
    _require_options(top, out, by_layer=by_layer)
    if by_position and (top is not None or out is not None):
        raise ArgumentError("by_position=True keeps all scores; expected neither top= nor out= with it")
    if isinstance(matrix, PMatInFiles):
        if out is not None or process_group is not None:
            raise ArgumentError(
                "scores of a matrix in files are sums over its parts, by one process; expected neither out= nor "
                "process_group= with it, or matrix.in_memory()"
            )
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
    network = run.network
    if not isinstance(matrix, PMat):
        with run.team.together("arguments"):
            require_team(matrix, run.team)
    inverse = matrix.inverse(0.0 if damping is None else damping)
    metric = Metric(inverse, network.collection, accumulation_dtype(network.dtype), network.device)
    cotangents = EmpiricalFisher(as_loss(loss, model))
    asked = cotangents if query_function is None else QueryFunction(_callable(query_function))
    question = Question(metric, cotangents, asked, top, by_layer=by_layer, by_position=by_position)
    if run.team.size > 1:
        said = matrix if isinstance(matrix, PMat) else (type(matrix), matrix.shape, matrix.dtype)
        agree(run, "influence", matrix=said, damping=damping, out=out is not None, question=question.told())
    with run.within():
        if run.team.size > 1:
            over_all = over_processes if isinstance(metric.matrix, PMat) else over_products
            return over_all(run, queries, question, out)
        if out is None:
            return question.scores(run, question.side(run, queries)).influence()
        with FileStore(out) as store:
            computed = question.scores(run, question.side(run, queries), store)
            return computed.in_file(store, computed.fingerprint())


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
