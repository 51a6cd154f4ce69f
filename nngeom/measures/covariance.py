"""The covariance of per-example loss gradients: second moments of rows from which their mean was taken first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.capture.network import Batch
from nngeom.core.centred import CentredJacobian
from nngeom.core.errors import UnsupportedError
from nngeom.core.jacobian import FullJacobian
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.cotangents.loss import EmpiricalFisher, Loss, as_loss
from nngeom.pmat.drive import Repeated, Source, built
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.implicit_fisher import ImplicitFisher
from nngeom.pmat.low_rank import PMatLowRank
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.representation import Representation, as_representation
from nngeom.pullback.linearization import Linearization
from nngeom.pullback.many_tangents import ManyTangents
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Chunk, Policy, Sweep, require_examples

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
    chosen = None if representation is PMatImplicit and not options else as_representation(representation, **options)
    if chosen is not None:
        _require_offered(chosen)
    run = Run.of(
        model,
        loader,
        function=function,
        layer_collection=layer_collection,
        progress=progress,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
    )
    run.require_alone("GradientCovariance")
    chosen = None if chosen is None else chosen.within(run.network.collection)
    part_of = None if chosen is None else chosen.part_of
    policy = Policy("mean row", part_of=part_of, reread=False)
    with run.within():
        sweep = Sweep(run, EmpiricalFisher(as_loss(loss, model)), policy).held()
        mean = mean_row(sweep)
        sweep = sweep.but(label="covariance", reread=True)
        if chosen is not None and not chosen.centred:
            chosen = chosen.last_sweep(built(chosen, run.network.collection, Repeated(sweep, chosen.passes)))
        if chosen is None:
            quiet = replace(sweep, run=run.on(sweep.run.loader).held().silent())
            return cast(M, ImplicitCovariance(quiet, mean=mean))
        return built(chosen, run.network.collection, Centred(Repeated(sweep, chosen.passes), mean))


def _require_offered(chosen: Representation[Any]) -> None:
    """Raise unless centred rows may enter, or do in the last sweep, in bases that others gave."""
    members = getattr(chosen, "members", (chosen,))
    kinds = [r.kind.__name__ for r in members if not r.centred and (r.passes == 1 or r.settings.get("sua"))]
    if kinds:
        raise UnsupportedError(
            "a covariance of gradients is offered as PMatDense, PMatDiag, PMatBlockDiag, PMatQuasiDiag, PMatLowRank, "
            "PMatEKFAC (without sua), PMatImplicit and other second moments of any rows, not as "
            f"{', '.join(kinds)}: centred rows have no Kronecker structure"
        )


@dataclass(frozen=True)
class MeanRow:
    """The mean row ``flat (d,)``, and every layout met."""

    flat: Tensor
    layouts: tuple[Layout, ...]

    def taken_from(self, chunk: Chunk) -> Chunk:
        """The rows of a chunk less their mean; parameters that a batch does not use had zero rows before."""
        jacobians = dict(chunk.jacobians)
        covered = {name for layout in jacobians for name in layout.names}
        for layout in self.layouts:
            if covered.isdisjoint(layout.names):
                jacobians[layout] = FullJacobian(self.flat.new_zeros(1, chunk.examples, *layout.sizes))
                covered |= set(layout.names)
        centred = {layout: CentredJacobian(j, layout.gather(self.flat)) for layout, j in jacobians.items()}
        return replace(chunk, jacobians=centred)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Centred:
    """A source of rows less their mean."""

    rows: Source
    mean: MeanRow

    def chunks(self) -> Iterator[Chunk]:
        """One pass over the data."""
        return map(self.mean.taken_from, self.rows.chunks())

    @property
    def run(self) -> Run | None:
        """The model, this process's data, and the processes it is split over."""
        return self.rows.run

    def restart(self) -> None:
        """Forget what is kept of the first pass: the next is over the data."""
        self.rows.restart()

    def raise_where_not_finite(self) -> None:
        """Raise for the first batch with outputs or gradients that are not finite, if there is one."""
        self.rows.raise_where_not_finite()


def mean_row(sweep: Sweep) -> MeanRow:
    """The mean row over examples, of one cotangent."""
    network = sweep.run.network
    total = torch.zeros(network.collection.numel, dtype=accumulation_dtype(network.dtype), device=network.device)
    layouts: dict[Layout, None] = {}
    count = 0
    for chunk in sweep.chunks():
        part = torch.zeros_like(total)
        for layout, j in chunk.jacobians.items():
            ones = torch.ones(j.shape[:2], dtype=j.dtype, device=j.device)
            layout.scatter_(part, j.vjp(ones).to(part.dtype))
            layouts[layout] = None
        total += part
        count += chunk.examples
    return MeanRow(total / require_examples(count), tuple(layouts))


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitCovariance(ImplicitFisher):
    """``1/n sum_i (g_i - m) <g_i - m, x>`` by a forward-mode and a backward pass."""

    mean: MeanRow = MeanRow(torch.zeros(0), ())

    def _chunks(self) -> Iterator[Chunk]:
        return map(self.mean.taken_from, self.sweep.chunks())

    def of_parameters(self, names: tuple[str, ...]) -> ImplicitCovariance:
        part = cast(ImplicitCovariance, super().of_parameters(names))
        with part.run.within():
            return replace(part, mean=mean_row(part.sweep))

    def _sandwich(self, tangents: ManyTangents, x: Tensor, start: int) -> Tensor:
        tangents.require_right()
        weighted, weights = self._weighted(tangents.outputs, tangents.push(x), tangents.batch, x, start)
        return tangents.pull(weighted).to(x.dtype) - weights.unsqueeze(1) * self.mean.flat

    def _by_tangents(self, x: Tensor) -> Tensor:
        linear, v = Linearization(self.network), self.named(x)
        total, count = torch.zeros_like(x), 0
        for batch in self.run.batches():
            outputs, tangent = linear.jvp(batch, v)
            weighted, weights = self._weighted(outputs, tangent.unsqueeze(0), batch, x.unsqueeze(0), count)
            total += linear.vjp(outputs, weighted[0]) - weights[0] * self.mean.flat
            count += outputs.shape[0]
        return total / count

    def _weighted(
        self, outputs: Tensor, tangents: Tensor, batch: Batch, x: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the outputs times ``<g_i - m, x>`` for every ``x [b, d]``, and the sums ``[b]`` of these."""
        columns = self.sweep.cotangents.columns(outputs.detach(), batch, start).make(0, 1)[0]
        inner = (columns * tangents).flatten(2).sum(2).to(x.dtype) - (x @ self.mean.flat).unsqueeze(1)
        shape = (*inner.shape, *[1] * (columns.ndim - 1))
        return inner.to(columns.dtype).view(shape) * columns, inner.sum(1)
