"""The rows a quantity is read from: sweeps over a probe set whose batches are held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core import memory
from nngeom.core.errors import LoaderError, NonFiniteError
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.products import EVERYTHING, Grouping, build, products
from nngeom.fmat.products import squared_norms as norms_by_group
from nngeom.fmat.store import Store
from nngeom.fmat.tiles import Side, matched, pairs, span
from nngeom.generator.sweep import Metric, Sweep
from nngeom.generator.task import Batch, Task, targets
from nngeom.space.collection import LayerCollection

Function = Callable[..., Tensor] | None


@dataclass(frozen=True)
class Probe:
    """A model and the batches it is examined on, held so that labels and rows belong to the same examples."""

    task: Task
    batches: list[Batch]

    @staticmethod
    def build(
        model: nn.Module, loader: Any, function: Function = None, layer_collection: LayerCollection | None = None
    ) -> Probe:
        """Read the loader once; raises :class:`LoaderError` when it is empty."""
        task = Task.build(model, function, layer_collection)
        return Probe(task, list(task.batches(loader)))

    def sweep(self, metric: Metric, check: bool = True, memory_budget: int | None = None) -> Sweep:
        """A sweep over the held batches."""
        return Sweep(self.task, self.batches, metric, memory_budget, check)

    def side(self, metric: Metric, check: bool = True, memory_budget: int | None = None) -> Side:
        """The same as one side of a kernel."""
        return Side(self.sweep(metric, check, memory_budget))

    def targets(self) -> Tensor | None:
        """The targets of all batches, concatenated; ``None`` where batches have none."""
        parts = [targets(b) for b in self.batches]
        if not all(isinstance(y, Tensor) for y in parts):
            return None
        return torch.cat([y.detach() for y in parts])


def require_finite_gradients(*gradients: Tensor) -> None:
    """Raise :class:`NonFiniteError` where gradients at hand contain NaN or infinity: they must not pass for zero
    ones.
    """
    if not all(bool(torch.isfinite(g).all()) for g in gradients):
        raise NonFiniteError("gradients contain NaN or infinity; check the inputs and the model they come from")


def require_labels(probe: Probe) -> Tensor:
    """The targets of a probe; raises :class:`LoaderError` where batches have none."""
    y = probe.targets()
    if y is None:
        raise LoaderError(
            "this quantity needs labels but a batch has none; expected batches (inputs, targets) or dicts with 'labels'"
        )
    return y


def row_products(rows: Side, columns: Side | None = None) -> Tensor:
    """``(k, n, k, m)``: inner products of the rows of two sides, or of one with itself, tile by tile."""
    return build(FMatDense, rows, columns, EVERYTHING)[""].tensor


def wide_kernels(rows: Side, by_layer: bool = False) -> dict[str, Tensor]:
    """``{"": (c, n, c, n)}``, or one a layer, in float64 whatever the model's dtype.

    Products of float32 rows rounded to float32 tell eigenvalues from zero down to ``N eps`` of the largest only, the
    rows themselves down to ``(N eps)^2``: what a log-determinant needs.
    """
    task = rows.sweep.task
    grouping = Grouping(tuple(task.collection.by_layer()), task.layer_of) if by_layer else EVERYTHING
    return products(FMatDense, rows.widened(), None, grouping, Store(grouping.names), None, False)


def layer_kernel(rows: Side, layer: str, outputs: int) -> Tensor:
    """``(c, n, c, n)``: the kernel of one layer's parameters."""
    n = rows.examples
    out = torch.zeros(outputs, n, outputs, n, dtype=rows.dtype, device=rows.device)
    for x, y in pairs(rows, None):
        (k, i), (l, j) = span(x), span(y)
        blocks = [jx.gram(jy) for owner, jx, jy in matched(x, y, rows.sweep.task.layer_of) if owner == layer]
        if blocks:
            tile = torch.stack(blocks).sum(0) if len(blocks) > 1 else blocks[0]
            out[k, i, l, j] = tile
            out[l, j, k, i] = tile.permute(2, 3, 0, 1)
    return out


def row_norms(side: Side) -> Tensor:
    """``(n,)``: squared norms of the rows summed over cotangents; rows are not formed where a factored form is
    cheaper.
    """
    return norms_by_group(side, EVERYTHING)[""].sum(0)


@torch.no_grad()
def squared_norms(probe: Probe, metric: Metric, check: bool = True, memory_budget: int | None = None) -> Tensor:
    """:func:`row_norms` of a metric on a probe."""
    with memory.limit(memory_budget):
        return row_norms(probe.side(metric, check, memory_budget))
