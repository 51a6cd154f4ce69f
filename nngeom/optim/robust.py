"""Averages of per-example gradients that no single example can carry away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.network import Network
from nngeom.core.errors import ArgumentError
from nngeom.core.given_plainly import require_real, require_real_tensor
from nngeom.core.memory import DEFAULT_BUDGET
from nngeom.cotangents.loss import EmpiricalFisher, Loss, as_loss
from nngeom.optim.arguments import number
from nngeom.optim.automatic import Automatic
from nngeom.optim.examples import Examples
from nngeom.optim.replicas import require_model, require_team_now
from nngeom.ranks.team import Team
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector
from nngeom.sweep.agreement import agree
from nngeom.sweep.observe import Observation, Observer
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Sweep
from nngeom.sweep.watching import Watching


def winsorized_gradient(
    model: nn.Module,
    batch: Any,
    loss: str | Loss | Callable[[Tensor, Any], Tensor],
    level: float,
    *,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
) -> PVector:
    """The mean of per-example loss gradients, clipped coordinate by coordinate to their ``level``-th and ``100 -
    level``-th percentiles.

    ``level`` is in percent a tail, [0, 50]: 0 is the plain gradient, 50 the coordinate-wise median. Percentiles are
    interpolated linearly between order statistics, as ``numpy.percentile`` does. ``batch`` is one batch or several,
    whose inputs and output gradients are held; rows are formed for some coordinates at a time. ``loss``: as for
    :func:`nngeom.EmpiricalFIM`. Raises :class:`ArgumentError` for a level out of range, and what
    :func:`nngeom.EmpiricalFIM` raises. Source: Tukey 1962 (winsorizing); Chatterjee & Zielinski 2020, section 5.5 (of
    gradients).
    """
    network, examples = _gradients(model, batch, loss, function, layer_collection)
    return PVector(network.collection, examples.reduced(lambda rows: winsorized(_finite(rows), level).mean(0)))


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

    ``batch`` and ``loss`` as for :func:`winsorized_gradient`. One group is the plain gradient, ``n`` groups the median
    of examples; sizes differ by one at most. An even number of groups takes the middle of the two middle values. Raises
    :class:`ArgumentError` unless ``1 <= groups <= n``.
    """
    network, examples = _gradients(model, batch, loss, function, layer_collection)
    if not isinstance(groups, int) or not 1 <= groups <= examples.examples:
        raise ArgumentError(
            f"groups is {groups!r}; expected a whole number from 1 to the number of examples, {examples.examples}"
        )

    def median(rows: Tensor) -> Tensor:
        return winsorized(torch.stack([part.mean(0) for part in _finite(rows).tensor_split(groups)]), 50.0)[0]

    return PVector(network.collection, examples.reduced(median))


def _finite(rows: Tensor) -> Tensor:
    require_real_tensor(rows, "a gradient of an example (see the inputs and the model)")
    return rows  # NaN would be sorted as the largest


def winsorized(rows: Tensor, level: float) -> Tensor:
    """``rows [n, d]`` clipped to their percentiles, column by column."""
    require_real(level, "level")
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

    ``lr``: the learning rate; ``level``: as for :func:`winsorized_gradient`; ``automatic``: passes in training mode are
    observed without :meth:`observe`; ``process_group``: that of a ``DistributedDataParallel`` model, whose processes'
    examples are winsorized as one set; ``options``: those of ``torch.optim.SGD``.
    What ``.grad`` holds besides the examples' gradients (a penalty on weights) is kept as it is. All examples seen
    since the last step are one set, held by their inputs and output gradients. Raises :class:`CoverageError` for models
    with parameters whose per-example gradients the passes do not show (weight norm): use
    :func:`winsorized_gradient` there.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        level: float = 10.0,
        *,
        layer_collection: LayerCollection | None = None,
        automatic: bool = False,
        process_group: Any = None,
        **options: Any,
    ):
        team = Team.of(process_group)
        require_model(model, team)
        collection = layer_collection if layer_collection is not None else LayerCollection.from_model(model)
        winsorized(torch.zeros(1, 1), level)  # checks the level
        number("lr", lr, 0)
        self.observer, self.level = Observer(model, collection, team=team), level
        self._examples = Examples(collection, self.observer)
        parameters = list(self.observer.network.parameters.values())
        self.automatic = Automatic(self.observer, self._examples, parameters, on=automatic)
        super().__init__(parameters, lr=lr, **options)
        agree(Run(self.observer.network, (), DEFAULT_BUDGET, team=team), "WinsorizedSGD", level=level)

    @contextlib.contextmanager
    def observe(self, scaler: Any = None) -> Iterator[Observation]:
        """Watch one or several forward and backward passes, as :meth:`NaturalGradient.observe`; ``scaler``: a
        ``GradScaler`` in use.
        """
        with Watching(self.observer, partial(require_team_now, self.observer.team)) as observation:
            yield observation
        self._examples.take(observation, scaler)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in any optimizer (``set_to_none``: instead of zeros); also drops what was observed since the last step."""
        self.automatic.forget()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Winsorize what was observed, and move; ``closure``, run with gradients, returns the loss that is returned."""
        loss = None
        if closure is not None:
            loss = self.automatic.run(closure)
        self.automatic.collect()
        if (closure is not None or self.automatic.on) and self.automatic.is_idle():
            return loss
        self._examples.meet()
        if not self._examples.examples:
            raise ArgumentError(
                "step() before anything was observed; expected the forward and backward pass inside `with "
                "opt.observe():`"
            )
        change = PVector(
            self.observer.network.collection,
            self._examples.reduced(lambda rows: (winsorized(rows, self.level) - rows).sum(0)),
        )
        for name, p in self.observer.network.parameters.items():
            if p.grad is not None:
                p.grad.add_(change[name].to(p.grad))
        self._examples.forget()
        super().step()
        return loss


def _gradients(
    model: nn.Module, batch: Any, loss: Any, function: Any, collection: LayerCollection | None
) -> tuple[Network, Examples]:
    """The gradients of every example's own loss."""
    run = Run.of(require_model(model), batch, function=function, layer_collection=collection)
    examples = Examples(run.network.collection)
    for chunk in Sweep(run, EmpiricalFisher(as_loss(loss, model))).chunks():
        examples.add(chunk)
    return run.network, examples
