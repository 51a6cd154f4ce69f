"""Rows of a model's Jacobian, batch by batch, in factored form: what a quantity of one's own is read from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nngeom.capture.gathered import sharded_modules
from nngeom.core.errors import ArgumentError
from nngeom.cotangents.fisher import ExactFisher, as_likelihood
from nngeom.cotangents.likelihood import Likelihood
from nngeom.cotangents.loss import EmpiricalFisher, EveryOutput, Loss, as_loss
from nngeom.ranks.team import ALONE
from nngeom.space.collection import LayerCollection
from nngeom.sweep.agreement import agree
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Chunk, Policy, Sweep, require_examples


def rows(
    model: nn.Module,
    loader: Any,
    *,
    loss: str | Loss | Callable[[Tensor, Any], Tensor] | None = None,
    likelihood: str | Likelihood | None = None,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
) -> Iterator[Chunk]:
    """The rows ``J[k, n]`` of every example ``n``, a :class:`Chunk` at a time, checked as for any measure.

    Without ``loss`` and ``likelihood`` row ``k`` is the gradient of output ``k``. With a ``loss`` (as for
    :func:`EmpiricalFIM`) there is one row an example, the gradient of its loss. With a ``likelihood`` (as for
    :func:`FIM`) the products of the rows of an example sum to its Fisher information.

    ``chunk.jacobians`` maps a block of parameters (its names in ``layout.names``) to its rows, a
    :class:`LayerJacobian`; ``layout.scatter_(out, x)`` writes the numbers of a block into flat ones ``(*batch, d)``. A
    batch comes in several chunks where its cotangents do not fit ``memory_budget``: ``chunk.cotangents`` is the number
    of the first of these and how many there are in all. With a ``process_group`` each process has the rows of its own
    examples, and ``chunk.start`` counts those of all in rank order; the call is a collective, going over the rows is
    not. Other arguments and errors as :func:`FIM`.
    """
    if loss is not None and likelihood is not None:
        raise ArgumentError("rows takes a loss or a likelihood, not both")
    run = Run.gathering(
        model,
        loader,
        function=function,
        layer_collection=layer_collection,
        progress=progress,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
    )
    if sharded_modules(model):
        run.require_alone("rows of a model under fully_shard, which all processes would have to gather together,")
    cotangents: Cotangents = EveryOutput()
    if loss is not None:
        cotangents = EmpiricalFisher(as_loss(loss, model))
    elif likelihood is not None:
        cotangents = ExactFisher(as_likelihood(likelihood, model))
    if run.team.size == 1:
        return _within(run, Sweep(run, cotangents, Policy("rows")).chunks(), 0)
    agree(run, "rows", rows=cotangents)
    with run.within(), run.team.together("examples") as note:
        sweep = Sweep(run, cotangents, Policy("rows", reread=False)).held()
        note.mine = sweep.run.count() if sweep.run.loader else 0
    require_examples(sum(note.all))
    alone = replace(sweep.run, team=ALONE)
    chunks = replace(sweep, run=alone).chunks() if alone.loader else iter(())
    return _within(alone, chunks, sum(note.all[: run.team.rank]))


def _within(run: Run, chunks: Iterator[Chunk], start: int) -> Iterator[Chunk]:
    """Every chunk made under the budget of its run, which is not left in force between them; ``start``: the number of
    its first example.
    """
    while True:
        with run.within():
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield replace(chunk, start=chunk.start + start)
