"""The second derivatives of every batch, and the entries of blocks and of the diagonal summed over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from nngeom.capture.graph import require_differentiable
from nngeom.capture.recorder import record
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.measures.second_derivatives import (
    Quadratic,
    SecondDerivatives,
    differentiated,
    require_finite_rows,
    require_symmetric,
)
from nngeom.pmat.block import Block
from nngeom.pmat.dense import DenseBlock
from nngeom.pullback.captured_pass import Pass
from nngeom.pullback.proofs import Proof
from nngeom.ranks.totals import totals
from nngeom.sweep.sweep import Sweep, require_examples


def batchwise(sweep: Sweep, width: int | None = None) -> Iterator[SecondDerivatives]:
    """The second derivatives of every batch. Without the ``width`` of an example, its bytes, every batch is looked at:
    modes that mix examples or draw at random are refused, and the derivatives checked, once for each graph of the
    model.
    """
    run, network, loss = sweep.run, sweep.run.network, sweep.cotangents.loss  # type: ignore[attr-defined]
    known: list[Proof] = []  # of graphs whose second derivatives were checked
    for index, batch in enumerate(run.followed(sweep.policy.label)):
        if width is not None:
            yield differentiated(network, loss, batch, index, width)
            continue
        capture = record(network, batch)
        activations = sum(use.shape.numel() for use in capture.uses) + capture.outputs.numel()
        each = 4 * activations * capture.outputs.element_size() // max(1, capture.outputs.shape[0])
        proof = None
        if run.check:
            separated = Pass(network, capture, set())
            separated.require_separate()
            proof = separated.proof
            del separated
        del capture
        second = differentiated(network, loss, batch, index, each)
        if proof is not None and not any(proof is other for other in known):
            require_differentiable(second.gradients.values())
            require_symmetric(second, partial(differentiated, network, Quadratic(), batch, index, each))
            known.append(proof)
        yield second


def squares(sweep: Sweep, groups: dict[Layout, tuple[str, ...]]) -> tuple[dict[Layout, Block], int]:
    """``{layout: DenseBlock}`` of the parameters of each group, and the number of examples."""
    like = torch.empty(0, dtype=accumulation_dtype(sweep.run.network.dtype), device=sweep.run.network.device)

    def local() -> tuple[list[Tensor], int]:
        sums, count = {layout: like.new_zeros(layout.numel, layout.numel) for layout in groups}, 0
        for batch in batchwise(sweep):
            for layout, names in groups.items():
                for lo, hi, rows in batch.times(names, _units(layout.numel, like), layout.numel):
                    sums[layout][lo:hi] += rows
            count += batch.examples
        return list(sums.values()), count

    found, count = totals(sweep.run.team, "Hessian", local)
    require_examples(count)
    return {
        layout: DenseBlock(require_finite_rows((m + m.T) / (2 * count), layout.names))
        for layout, m in zip(groups, found)
    }, count


def diagonal(sweep: Sweep, width: int | None = None) -> tuple[Tensor, int]:
    """The diagonal ``(d,)``, a layer at a time, and the number of examples."""
    (total,), count = totals(sweep.run.team, "diagonal of the Hessian", lambda: _diagonals(sweep, width))
    return require_finite_rows(total / require_examples(count), sweep.run.network.collection.names), count


def _diagonals(sweep: Sweep, width: int | None) -> tuple[list[Tensor], int]:
    """The sum of the diagonals of this process's examples, and how many these are."""
    collection, network = sweep.run.network.collection, sweep.run.network
    layers = {collection.span(names): names for names in collection.by_layer().values()}
    total = torch.zeros(collection.numel, dtype=accumulation_dtype(network.dtype), device=network.device)
    count = 0
    for batch in batchwise(sweep, width):
        for layout, names in layers.items():
            part = total.new_empty(layout.numel)
            for lo, hi, rows in batch.times(names, _units(layout.numel, total), layout.numel):
                part[lo:hi] = rows[:, lo:hi].diagonal()
            held = layout.gather(total).flatten()
            layout.scatter_(total, (held + part).view(layout.sizes))
        count += batch.examples
    return [total], count


def _units(p: int, like: Tensor) -> Callable[[int, int], Tensor]:
    """Rows ``lo .. hi - 1`` of the identity."""

    def rows(lo: int, hi: int) -> Tensor:
        out = like.new_zeros(hi - lo, p)
        column = torch.arange(lo, hi, device=out.device)
        out[column - lo, column] = 1
        return out

    return rows
