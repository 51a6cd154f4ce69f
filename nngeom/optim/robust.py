"""Averages of per-example gradients that no single example can carry away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core.errors import ArgumentError, CoverageError
from nngeom.generator.observe import Observation, Observer
from nngeom.generator.sweep import Chunk, Sweep
from nngeom.generator.task import Task
from nngeom.metrics.loss import EmpiricalFisher, Loss, as_loss
from nngeom.pmat.recipe import write_rows
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector


def winsorized_gradient(
    model: nn.Module,
    batch: Any,
    loss: str | Loss | Callable[[Tensor, Any], Tensor],
    level: float,
    *,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
) -> PVector:
    """The mean of per-example loss gradients, clipped coordinate by coordinate to their ``level``-th and ``100 - level``-th percentiles.

    ``level`` is in percent a tail, [0, 50]: 0 is the plain gradient, 50 the coordinate-wise median. Percentiles are
    interpolated linearly between order statistics, as ``numpy.percentile`` does. ``batch`` is one batch or several;
    memory is ``n x d``. Raises :class:`ArgumentError` for a level out of range, and what :func:`nngeom.EmpiricalFIM`
    raises. Source: Tukey 1962 (winsorizing); Chatterjee & Zielinski 2020, section 5.5 (of gradients).
    """
    task, rows = _gradients(model, batch, loss, function, layer_collection)
    return PVector(task.collection, winsorized(rows, level).mean(0))


def median_of_means_gradient(
    model: nn.Module,
    batch: Any,
    loss: str | Loss | Callable[[Tensor, Any], Tensor],
    groups: int,
    *,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
) -> PVector:
    """The coordinate-wise median of the mean gradients of ``groups`` runs of neighbouring examples.

    One group is the plain gradient, ``n`` groups the median of examples; sizes differ by one at most. An even number of
    groups takes the middle of the two middle values. Raises :class:`ArgumentError` unless ``1 <= groups <= n``.
    """
    task, rows = _gradients(model, batch, loss, function, layer_collection)
    if not isinstance(groups, int) or not 1 <= groups <= len(rows):
        raise ArgumentError(f"groups is {groups!r}; expected a whole number from 1 to the number of examples, {len(rows)}")
    means = torch.stack([part.mean(0) for part in rows.tensor_split(groups)])
    return PVector(task.collection, winsorized(means, 50.0)[0])


def winsorized(rows: Tensor, level: float) -> Tensor:
    """``rows [n, d]`` clipped to their percentiles, column by column."""
    if not 0 <= level <= 50:
        raise ArgumentError(f"level is {level}; expected percent in each tail, from 0 to 50")
    ordered = rows.sort(0).values
    at = (len(rows) - 1) * level / 100

    def percentile(x: float) -> Tensor:
        below = min(int(x), len(rows) - 1)
        return torch.lerp(ordered[below], ordered[min(below + 1, len(rows) - 1)], x - below)

    low, high = percentile(at), percentile(len(rows) - 1 - at)
    return rows.clamp(torch.minimum(low, high), torch.maximum(low, high))


class WinsorizedSGD(torch.optim.SGD):
    """``torch.optim.SGD`` on winsorized gradients; forward and backward passes go inside :meth:`observe`.

    What ``.grad`` holds besides the examples' gradients (a penalty on weights) is kept as it is. All examples seen since
    the last step are one set. Memory is ``n x d``. Raises :class:`CoverageError` for models with parameters whose
    per-example gradients the passes do not show (recurrent cells): use :func:`winsorized_gradient` there.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3, level: float = 10.0, *, layer_collection: LayerCollection | None = None, **options: Any):
        collection = layer_collection if layer_collection is not None else LayerCollection.from_model(model)
        winsorized(torch.zeros(1, 1), level)  # checks the level
        self.observer, self.level = Observer(model, collection), level
        self._rows: list[Tensor] = []
        super().__init__(list(self.observer.task.parameters.values()), lr=lr, **options)

    @contextlib.contextmanager
    def observe(self, scaler: Any = None) -> Iterator[Observation]:
        """Watch one or several forward and backward passes, as :meth:`NaturalGradient.observe`."""
        with self.observer.watch() as seen:
            yield seen
        if self.observer.batchwise:
            raise CoverageError(f"parameters {sorted(self.observer.batchwise)[:4]} have no per-example gradients here; use winsorized_gradient for this model")
        scale = 1.0 if scaler is None else scaler.get_scale()
        with torch.no_grad():
            self._rows += [_rows(chunk, self.observer.task.collection) / scale for chunk in seen.chunks]
        seen.chunks.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also drops what was observed since the last step."""
        self._rows = []
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Winsorize what was observed, and move."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._rows:
            raise ArgumentError("step() before anything was observed; expected the forward and backward pass inside `with opt.observe():`")
        rows = torch.cat(self._rows)
        change = PVector(self.observer.task.collection, (winsorized(rows, self.level) - rows).sum(0))
        for name, p in self.observer.task.parameters.items():
            if p.grad is not None:
                p.grad.add_(change[name].to(p.grad))
        self._rows = []
        super().step()
        return loss


def _gradients(model: nn.Module, batch: Any, loss: Any, function: Any, collection: LayerCollection | None) -> tuple[Task, Tensor]:
    """``[n, d]``: the gradient of every example's own loss."""
    task = Task.build(model, function, collection)
    rows = [_rows(chunk, task.collection) for chunk in Sweep(task, batch, EmpiricalFisher(as_loss(loss))).chunks()]
    return task, torch.cat(rows)


def _rows(chunk: Chunk, collection: LayerCollection) -> Tensor:
    like = next(iter(chunk.jacobians.values()))
    rows = torch.zeros(1, chunk.examples, collection.numel, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        for layout, j in chunk.jacobians.items():
            write_rows(rows, j, layout)
    return rows[0]
