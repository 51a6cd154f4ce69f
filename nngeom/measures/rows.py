"""Rows of a model's Jacobian, batch by batch, in factored form: what a quantity of one's own is read from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from nngeom.core.errors import ArgumentError
from nngeom.cotangents.fisher import ExactFisher, as_likelihood
from nngeom.cotangents.likelihood import Likelihood
from nngeom.cotangents.loss import EmpiricalFisher, EveryOutput, Loss, as_loss
from nngeom.space.collection import LayerCollection
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Chunk, Policy, Sweep


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
    of the first of these and how many there are in all. Other arguments and errors as :func:`FIM`.
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
    run.require_alone("rows")
    cotangents: Cotangents = EveryOutput()
    if loss is not None:
        cotangents = EmpiricalFisher(as_loss(loss, model))
    elif likelihood is not None:
        cotangents = ExactFisher(as_likelihood(likelihood, model))
    return _within(run, Sweep(run, cotangents, Policy("rows")).chunks())


def _within(run: Run, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Every chunk made under the budget of its run, which is not left in force between them."""
    while True:
        with run.within():
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk
