"""Geometric complexity: how fast the outputs change with the inputs, on average over the data."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.batch import with_input_gradients
from nngeom.capture.fused import twice_differentiable
from nngeom.capture.network import Batch, Network, require_finite
from nngeom.capture.recorder import record
from nngeom.core import memory
from nngeom.core.errors import ArgumentError
from nngeom.cotangents.loss import EveryOutput
from nngeom.pullback.backward import pull_back
from nngeom.ranks.totals import totals
from nngeom.solve.hutchinson import rademacher
from nngeom.space.collection import LayerCollection
from nngeom.sweep.agreement import agree
from nngeom.sweep.run import Function, Run
from nngeom.sweep.sweep import require_examples


def geometric_complexity(
    model: nn.Module,
    loader: Any,
    *,
    differentiable: bool = False,
    estimator: str = "exact",
    samples: int = 1,
    generator: torch.Generator | None = None,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
) -> Tensor:
    """``1/n sum_i |d f(x_i) / d x_i|_F^2`` of the outputs before any softmax: a scalar.

    ``estimator="exact"``: one backward pass an output (all at once); ``"rademacher"``: unbiased, one a sample, of
    ``samples`` draws of signs by ``generator`` (torch's global one by default). ``differentiable``: the result carries
    its graph, to be added to a loss. The inputs are the first item of a batch (or every floating-point tensor in it but
    the labels); token indices raise :class:`ArgumentError`: pass embeddings. Examples must not mix: training-mode batch
    normalisation or dropout raises :class:`ModeError`.

    Source: Dherin et al. 2022, definition of geometric complexity.
    """
    if estimator not in ("exact", "rademacher"):
        raise ArgumentError(f"estimator is {estimator!r}; expected 'exact' or 'rademacher'")
    if not isinstance(samples, int) or samples < 1:
        raise ArgumentError(f"samples is {samples!r}; expected a whole number of at least 1")
    run = Run.of(
        model,
        loader,
        function=function,
        layer_collection=layer_collection,
        memory_budget=memory_budget,
        process_group=process_group,
    )
    if differentiable:
        run.require_alone("differentiable=True")
    if estimator == "rademacher":
        run.require_alone("estimator='rademacher'")
    network = run.network
    agree(run, "geometric_complexity")

    def local() -> tuple[list[Tensor], int]:
        total, count = torch.zeros((), dtype=network.dtype, device=network.device), 0
        for index, batch in enumerate(run.batches()):
            part, n = _batch(
                network,
                batch,
                index,
                graph=differentiable,
                estimator=estimator,
                samples=samples,
                generator=generator,
            )
            total, count = total + part, count + n
        return [total], count

    with run.within():
        (total,), count = totals(run.team, "geometric complexity", local)
    return total / require_examples(count)


def _batch(
    network: Network,
    batch: Batch,
    index: int,
    *,
    graph: bool,
    estimator: str,
    samples: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, int]:
    batch, inputs = with_input_gradients(batch)
    with twice_differentiable() if graph else contextlib.nullcontext():
        outputs = record(
            replace(network, parameters={}), batch
        ).outputs  # watched for what mixes examples; no parameter followed
    require_finite(outputs.detach(), "outputs", index)
    n = outputs.shape[0]
    total = torch.zeros((), dtype=outputs.dtype, device=outputs.device)
    if not outputs.requires_grad:  # the outputs do not depend on the inputs
        return total, n
    each = 3 * sum(x.numel() for x in inputs) * outputs.element_size() + outputs.numel() * outputs.element_size()
    columns = EveryOutput().columns(outputs.detach(), batch, 0)
    signs = (
        rademacher(samples, *outputs.shape, like=outputs, generator=generator) / samples**0.5
        if estimator == "rademacher"
        else None
    )
    number = columns.count if signs is None else samples
    for lo, hi in memory.pieces(number, each):
        v = columns.make(lo, hi) if signs is None else signs[lo:hi]
        for g in pull_back(outputs, inputs, [x.shape for x in inputs], v, retain=hi < number, create_graph=graph):
            total = total + g.square().sum()
    return (total if graph else total.detach()), n
