"""The covariance of per-example loss gradients: second moments of rows from which their mean was taken first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.capture.network import Batch
from nngeom.cotangents.loss import EmpiricalFisher, Loss, as_loss
from nngeom.measures.arguments import require_known
from nngeom.measures.centred import MeanRow, centred, mean_row, require_offered
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.implicit_fisher import ImplicitFisher
from nngeom.pmat.low_rank import PMatLowRank
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.representation import Representation, as_representation
from nngeom.pullback.linearization import Linearization
from nngeom.pullback.many_tangents import ManyTangents
from nngeom.space.collection import LayerCollection
from nngeom.sweep.agreement import agree, first_look
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Chunk, Policy, Sweep

M = TypeVar("M", bound=ParameterOperator, default=PMatLowRank)


def GradientCovariance(
    model: nn.Module,
    loader: Any,
    representation: type[M] | Representation[M] = PMatLowRank,  # type: ignore[assignment]
    *,
    loss: str | Loss | Callable[[Tensor, Any], Tensor],
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
    **options: Any,
) -> M:
    """The covariance of per-example loss gradients, ``1/n sum_i (g_i - m)(g_i - m)^T`` with their mean ``m``.

    Divided by ``n``, as every other measure. Two sweeps, the mean first, so that large means cancel before any square;
    the batches are kept between them.

    Args:
        representation: what holds it, as for :func:`FIM`: those of second moments of any rows hold it as they hold
            those, your own too. PMatEKFAC has the eigenbasis of the second moment's factors, and in it the diagonal of
            the covariance. PMatKFAC raises :class:`UnsupportedError`.
        loss: as for :func:`EmpiricalFIM`.
        options: of the representation.

    Other arguments and errors as for :func:`EmpiricalFIM`. Source: Le Roux et al. 2008 (TONGA).
    """
    require_known(GradientCovariance, representation, options)
    chosen = None if representation is PMatImplicit and not options else as_representation(representation, **options)
    if chosen is not None:
        require_offered(chosen, "a covariance of gradients")
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
    cotangents = EmpiricalFisher(as_loss(loss, model))
    if chosen is not None:
        return cast(M, centred(run, cotangents, chosen, "covariance"))
    with run.within():
        sweep = Sweep(run, cotangents, Policy("mean row", reread=False)).held()
        agree(run, "covariance", representation=None, metric=cotangents)
        mean = mean_row(sweep)
        sweep = sweep.but(label="covariance", reread=True)
        quiet = first_look(run, lambda: replace(sweep, run=sweep.run.held().silent()))
        return cast(M, ImplicitCovariance(quiet, mean=mean))


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitCovariance(ImplicitFisher):
    """``1/n sum_i (g_i - m) <g_i - m, x>`` by a forward-mode and a backward pass."""

    mean: MeanRow = field(kw_only=True)

    def _chunks(self) -> Iterator[Chunk]:
        return map(self.mean.taken_from, self.sweep.chunks())

    def of_parameters(self, names: tuple[str, ...]) -> ImplicitCovariance:
        part = cast(ImplicitCovariance, super().of_parameters(names))
        with part.run.within():
            return replace(part, mean=mean_row(part.sweep))

    def _sandwich(self, tangents: ManyTangents, x: Tensor, start: int) -> Tensor:
        tangents.require_right()
        weighted, weights = self._weighted(tangents.outputs, tangents.push(x), tangents.batch, x, start)
        return tangents.pull(weighted).to(x.dtype) - weights.unsqueeze(1) * self.mean.flat[0]

    def _by_tangents(self, x: Tensor) -> tuple[Tensor, int]:
        linear, v = Linearization(self.network), self.named(x)
        total, count = torch.zeros_like(x), 0
        for batch in self.run.batches():
            outputs, tangent = linear.jvp(batch, v)
            weighted, weights = self._weighted(outputs, tangent.unsqueeze(0), batch, x.unsqueeze(0), count)
            total += linear.vjp(outputs, weighted[0]) - weights[0] * self.mean.flat[0]
            count += outputs.shape[0]
        return total, count

    def _weighted(
        self, outputs: Tensor, tangents: Tensor, batch: Batch, x: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the outputs times ``<g_i - m, x>`` for every ``x [b, d]``, and the sums ``[b]`` of these."""
        columns = self.sweep.cotangents.columns(outputs.detach(), batch, start).make(0, 1)[0]
        inner = (columns * tangents).flatten(2).sum(2).to(x.dtype) - (x @ self.mean.flat[0]).unsqueeze(1)
        shape = (*inner.shape, *[1] * (columns.ndim - 1))
        return inner.to(columns.dtype).view(shape) * columns, inner.sum(1)
