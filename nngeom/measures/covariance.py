"""The covariance of per-example loss gradients: second moments of rows from which their mean was taken first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.cotangents.loss import EmpiricalFisher, Loss, as_loss
from nngeom.measures.arguments import require_known
from nngeom.measures.centred import centred, require_offered
from nngeom.measures.implicit_centred import implicit_centred
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.low_rank import PMatLowRank
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.representation import Representation, as_representation
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Run

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
        sums=representation is not PMatImplicit,
    )
    cotangents = EmpiricalFisher(as_loss(loss, model))
    if chosen is not None:
        return cast(M, centred(run, cotangents, chosen, "covariance"))
    return cast(M, implicit_centred(run, cotangents, "covariance"))
