"""Second moments of the gradients of a loss, with the targets of the batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.cotangents.loss import EmpiricalFisher, Loss, as_loss
from nngeom.measures.arguments import require_known
from nngeom.measures.measured import measured
from nngeom.pmat.kfac import PMatKFAC
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.representation import Representation
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Policy

M = TypeVar("M", bound=ParameterOperator, default=PMatKFAC)


def EmpiricalFIM(
    model: nn.Module,
    loader: Any,
    representation: type[M] | Representation[M] = PMatKFAC,  # type: ignore[assignment]
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
    """The second moment of per-example loss gradients, ``1/n sum_i g_i g_i^T``, with the targets of the batches.

    Not the Fisher matrix unless the model is right about its labels.

    Args:
        representation: what holds it, as for :func:`FIM`.
        loss: ``"cross_entropy"``, ``"mse"`` (``0.5 * (f - y)**2`` summed over outputs), ``"bce"``, ``"poisson"``,
            :class:`CrossEntropy`, :class:`CausalLM` (what ``"cross_entropy"`` is for causal language models of
            ``transformers``), ``nn.CrossEntropyLoss``, ``nn.MSELoss``, ``nn.BCEWithLogitsLoss`` and
            ``nn.PoissonNLLLoss`` modules, whose ``reduction`` is not ours, or a function ``(outputs, targets) ->
            (n,)``.
        options: of the representation.

    Raises :class:`OutputError` on targets that do not fit; other arguments and errors as for :func:`FIM`.
    """
    require_known(EmpiricalFIM, representation, options)
    run = Run.of(
        model,
        loader,
        function=function,
        layer_collection=layer_collection,
        progress=progress,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
        parts=True,
    )
    cotangents = EmpiricalFisher(as_loss(loss, model))
    return cast(M, measured(run, cotangents, representation, options, Policy("EmpiricalFIM", reread=True)))
