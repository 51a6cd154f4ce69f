"""The generalised Gauss-Newton matrix of a loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.cotangents.loss import GaussNewton, Loss, as_loss
from nngeom.measures.arguments import require_known
from nngeom.measures.centred import centred_moments
from nngeom.measures.measured import measured
from nngeom.measures.probed import probed
from nngeom.pmat.estimate import MatrixEstimate
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.kfac import PMatKFAC
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.representation import Representation
from nngeom.space.collection import LayerCollection
from nngeom.sweep.checkpoint import Asked
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Policy

M = TypeVar("M", bound=ParameterOperator, default=PMatKFAC)


# fmt: off
@overload
def GGN(model: nn.Module, loader: Any, representation: type[M] | Representation[M] = ..., *,
        loss: str | Loss | Callable[[Tensor, Any], Tensor], centered: bool = False, estimator: None = None,
        samples: None = None, generator: None = None, index: None = None, function: Callable[..., Tensor] | None = None,
        layer_collection: LayerCollection | None = None, progress: bool = False, memory_budget: int | None = None,
        check: bool = True, process_group: Any = None,
        checkpoint: str | os.PathLike[str] | None = None, every: float = 10.0, **options: Any) -> M: ...
@overload
def GGN(model: nn.Module, loader: Any, representation: type[Any] | Representation[Any] = PMatKFAC, *,
        loss: str | Loss | Callable[[Tensor, Any], Tensor], centered: Literal[False] = False,
        estimator: Literal["rademacher"], samples: int | None = None, generator: torch.Generator | None = None,
        index: Callable[[Any], Any] | None = None, function: Callable[..., Tensor] | None = None,
        layer_collection: LayerCollection | None = None, progress: bool = False, memory_budget: int | None = None,
        check: bool = True, process_group: Any = None,
        checkpoint: str | os.PathLike[str] | None = None, every: float = 10.0, **options: Any) -> MatrixEstimate: ...
# fmt: on
def GGN(
    model: nn.Module,
    loader: Any,
    representation: Any = PMatKFAC,
    *,
    loss: str | Loss | Callable[[Tensor, Any], Tensor],
    centered: bool = False,
    estimator: str | None = None,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    index: Callable[[Any], Any] | None = None,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: float = 10.0,
    **options: Any,
) -> Any:
    """The generalised Gauss-Newton matrix ``1/n sum_i J_i^T (d2 loss_i / df2) J_i`` of a loss convex in the outputs.

    Args:
        representation: what holds it, as for :func:`FIM`.
        loss: as for :func:`EmpiricalFIM`; a function that is not convex in the outputs raises :class:`ArgumentError`.
        centered: as for :func:`FIM`; of a function, rows are those of the symmetric root.
        estimator: ``None``, exact; or ``"rademacher"``, random probes of very many outputs, as for :func:`FIM`.
        samples: how many probes (8 by default).
        generator: of the probes (torch's global one by default).
        index: of the probes, as for :func:`FIM_MonteCarlo`.
        checkpoint: a folder for the sums, as for :func:`FIM`.
        every: minutes, as for :func:`FIM`.
        options: of the representation.

    Other arguments and errors as for :func:`FIM`.
    """
    require_known(GGN, representation, options)
    asked = Asked.of(checkpoint, every)
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
    if centered:
        return centred_moments(run, as_loss(loss, model), representation, options, estimator, index, asked=asked)
    cotangents = probed(GaussNewton(as_loss(loss, model)), estimator, samples, generator)
    policy = Policy("GGN", reread=estimator is None)
    return measured(run, cotangents, representation, options, policy, index=index, asked=asked)
