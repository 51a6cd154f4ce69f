"""The covariance of per-example loss gradients: second moments of rows from which their mean was taken first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core import memory
from nngeom.core.errors import UnsupportedError
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.generator.linearization import Linearization
from nngeom.generator.sweep import Chunk, Sweep, require_examples
from nngeom.generator.task import Batch, Task
from nngeom.measure import drive
from nngeom.metrics.loss import EmpiricalFisher, Loss, as_loss
from nngeom.pmat.implicit import ImplicitFisher, PMatImplicit
from nngeom.pmat.low_rank import PMatLowRank
from nngeom.pmat.mixed import as_representation
from nngeom.pmat.recipe import Scope
from nngeom.space.collection import LayerCollection


def GradientCovariance(
    model: nn.Module,
    loader: Any,
    representation: Any = PMatLowRank,
    *,
    loss: str | Loss | Callable[[Tensor, Any], Tensor],
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
    **options: Any,
) -> Any:
    """The covariance of per-example loss gradients, ``1/n sum_i (g_i - m)(g_i - m)^T`` with their mean ``m``.

    Divided by ``n``, as every other measure. Two sweeps, the mean first, so that large means cancel before any square;
    the batches are kept between them. Representations of second moments of any rows hold it as they hold those, your
    own too; those of Kronecker products (``centred = False``) raise :class:`UnsupportedError`. Losses, other arguments
    and errors as :func:`EmpiricalFIM`.
    Source: Le Roux et al. 2008 (TONGA).
    """
    if process_group is not None:
        raise UnsupportedError("process_group is not available for gradient covariances; pass process_group=None")
    chosen = None if representation is PMatImplicit and not options else as_representation(representation, **options)
    if chosen is not None and not chosen.centred:
        kinds = [r.kind.__name__ for r in getattr(chosen, "members", (chosen,)) if not r.centred]
        raise UnsupportedError(
            "a covariance of gradients is offered as PMatDense, PMatDiag, PMatBlockDiag, PMatQuasiDiag, PMatLowRank, "
            f"PMatImplicit and other second moments of any rows, not as {', '.join(kinds)}: centred rows have no "
            "Kronecker structure"
        )
    part_of = None if chosen is None else chosen.part_of
    task = Task.build(model, function, layer_collection)
    with memory.limit(memory_budget):
        metric = EmpiricalFisher(as_loss(loss, model))
        sweep = Sweep(task, loader, metric, memory_budget, check, progress, part_of, reread=False, label="mean row")
        mean, layouts = mean_row(sweep)
        seen = list(task.batches(sweep.loader)) if chosen is None else sweep.loader
        centred = CentredSweep(
            task, seen, metric, memory_budget, check, progress, part_of, label="covariance", mean=mean, layouts=layouts
        )
        centred._demoted = sweep._demoted  # what the first sweep found out
        if chosen is None:
            return ImplicitCovariance(centred)
        blocks = drive(chosen.recipe(Scope(task.collection, task.collection.names)), centred, chosen.passes)
    return chosen.kind._make(task.collection, blocks, centred.count)


def mean_row(sweep: Sweep) -> tuple[Tensor, tuple[Layout, ...]]:
    """The mean row ``(d,)`` over examples, of one cotangent, and every layout met."""
    total = torch.zeros(
        sweep.task.collection.numel, dtype=accumulation_dtype(sweep.task.dtype), device=sweep.task.device
    )
    layouts: dict[Layout, None] = {}
    for chunk in sweep.chunks():
        part = torch.zeros_like(total)
        for layout, j in chunk.jacobians.items():
            ones = torch.ones(j.shape[:2], dtype=j.dtype, device=j.device)
            layout.scatter_(part, j.vjp(ones).to(part.dtype))
            layouts[layout] = None
        total += part
    return total / require_examples(sweep.count), tuple(layouts)


@dataclass(frozen=True, eq=False)
class CentredJacobian(LayerJacobian):
    """Rows minus a mean."""

    inner: LayerJacobian
    mean: Tensor  # [s o i]

    @property
    def shape(self):
        return self.inner.shape

    @property
    def dtype(self):
        return self.mean.dtype

    @property
    def device(self):
        return self.mean.device

    def matrix(self):
        return self.inner.matrix() - self.mean

    def examples(self, lo, hi):
        return CentredJacobian(self.inner.examples(lo, hi), self.mean)

    def cotangents(self, lo, hi):
        return CentredJacobian(self.inner.cotangents(lo, hi), self.mean)


@dataclass
class CentredSweep(Sweep):
    """A sweep whose rows have their mean taken from them; parameters that a batch does not use have zero rows
    before.
    """

    mean: Tensor | None = None
    layouts: tuple[Layout, ...] = ()

    def _batch(self, batch: Batch, index: int, watch: bool, after: tuple[int, int]) -> Iterator[Chunk]:
        for chunk in super()._batch(batch, index, watch, after):
            jacobians = dict(chunk.jacobians)
            covered = {name for layout in jacobians for name in layout.names}
            for layout in self.layouts:
                if covered.isdisjoint(layout.names):
                    jacobians[layout] = FullJacobian(self.mean.new_zeros(1, chunk.examples, *layout.sizes))  # type: ignore[union-attr]
                    covered |= set(layout.names)
            mean: Tensor = self.mean  # type: ignore[assignment]
            centred = {layout: CentredJacobian(j, layout.gather(mean)) for layout, j in jacobians.items()}
            yield replace(chunk, jacobians=centred)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitCovariance(ImplicitFisher):
    """``1/n sum_i (g_i - m) <g_i - m, x>`` by a forward-mode and a backward pass."""

    def _by_tangents(self, x):
        linear, v = Linearization(self.task), self._split(x)
        mean: Tensor = self.sweep.mean  # type: ignore[attr-defined]
        total, weight, count = torch.zeros_like(x), torch.zeros((), dtype=x.dtype, device=x.device), 0
        for batch in self.task.batches(self.sweep.loader):
            outputs, tangent = linear.jvp(batch, v)
            columns = self.sweep.metric.columns(outputs.detach(), batch, count).make(0, 1)[0]
            inner = (columns * tangent).flatten(1).sum(1).to(x.dtype) - mean @ x
            weighted = inner.to(columns.dtype).view(-1, *[1] * (columns.ndim - 1)) * columns
            total += linear.vjp(outputs, weighted)
            weight += inner.sum()
            count += outputs.shape[0]
        return (total - weight * mean) / count
