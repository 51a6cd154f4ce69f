"""From a model and data to a matrix: one function a measure, each a metric handed to the same machinery."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.core.stream import seed_of
from nngeom.cotangents.fisher import ExactFisher, MonteCarloFisher, as_likelihood
from nngeom.cotangents.likelihood import Likelihood
from nngeom.cotangents.loss import EmpiricalFisher, Loss, as_loss
from nngeom.measures.arguments import require_known
from nngeom.measures.centred import centred_moments
from nngeom.measures.measured import measured
from nngeom.measures.probed import probed, require_samples
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
def FIM(model: nn.Module, loader: Any, representation: type[M] | Representation[M] = ..., *,
        likelihood: str | Likelihood = "categorical", centered: bool = False, estimator: None = None,
        samples: None = None, generator: None = None, index: None = None, function: Callable[..., Tensor] | None = None,
        layer_collection: LayerCollection | None = None, progress: bool = False, memory_budget: int | None = None,
        check: bool = True, process_group: Any = None,
        checkpoint: str | os.PathLike[str] | None = None, every: float = 10.0, **options: Any) -> M: ...
@overload
def FIM(model: nn.Module, loader: Any, representation: type[Any] | Representation[Any] = PMatKFAC, *,
        likelihood: str | Likelihood = "categorical", centered: Literal[False] = False,
        estimator: Literal["rademacher"], samples: int | None = None, generator: torch.Generator | None = None,
        index: Callable[[Any], Any] | None = None, function: Callable[..., Tensor] | None = None,
        layer_collection: LayerCollection | None = None, progress: bool = False, memory_budget: int | None = None,
        check: bool = True, process_group: Any = None,
        checkpoint: str | os.PathLike[str] | None = None, every: float = 10.0, **options: Any) -> MatrixEstimate: ...
# fmt: on
def FIM(
    model: nn.Module,
    loader: Any,
    representation: Any = PMatKFAC,
    *,
    likelihood: str | Likelihood = "categorical",
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
    """The Fisher information matrix, with the expectation over labels in closed form.

    ``F = 1/n sum_i E_y[s s^T]`` with the score ``s`` of ``log p(y | x_i)`` in the parameters; targets in the batches
    are not used (but for positions that ``ignore_index`` leaves out).

    Args:
        representation: what holds the matrix: a PMat class, one with options, or ``PMatMixed({...})``.
        likelihood: ``p(y | outputs)``: ``"categorical"`` (for a causal language model of ``transformers`` and a dict
            batch with labels :class:`CausalLM`), ``"bernoulli"``, ``"gaussian"``, or a :class:`Likelihood`. Outputs are
            ``(n, c)``, or ``(n, *shape)`` with a likelihood that says what the axes are.
        centered: of rows less their mean over examples: those of one output each, ``sqrt(p_y)`` times a class's score.
        estimator: ``None``, exact; or ``"rademacher"``, for very many outputs: random probes ``u = L r`` of them
            replace the columns of the square root ``L`` of their Fisher information, one backward pass each.
        samples: how many probes (8 by default).
        generator: of their signs ``r`` (torch's global one by default), keyed as the draws of :func:`FIM_MonteCarlo`.
        index: of the probes, as for :func:`FIM_MonteCarlo`.
        checkpoint: a folder in which the sums of every sweep are kept, so that the same call takes them up after an
            interruption, with the same bits; of second moments (not centred, estimated or implicit ones).
        every: how many minutes pass from one time that sums are kept to the next.
        options: of the representation, as ``sharing="reduce"``.

    Estimated, the result is a :class:`MatrixEstimate`: its ``matrix`` is unbiased where the representation is linear in
    second moments of gradients (not EKFAC in a basis from the probes, but its trace; not the joined factors of KFAC for
    a parameter in unlike uses), its readings have standard errors, and ``samples`` matrices are kept for them.

    Raises :class:`LoaderError`, :class:`OutputError`, :class:`ModeError`, :class:`CoverageError`,
    :class:`NonFiniteError` and what the representation raises. Source: George 2023, thesis, sections 2.4, 3.2.2.
    """
    require_known(FIM, representation, options)
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
        return centred_moments(
            run, as_likelihood(likelihood, model), representation, options, estimator, index, asked=asked
        )
    cotangents = probed(ExactFisher(as_likelihood(likelihood, model)), estimator, samples, generator)
    policy = Policy("FIM", reread=estimator is None)
    return measured(run, cotangents, representation, options, policy, index=index, asked=asked)


def FIM_MonteCarlo(
    model: nn.Module,
    loader: Any,
    representation: type[M] | Representation[M] = PMatKFAC,  # type: ignore[assignment]
    *,
    likelihood: str | Likelihood = "categorical",
    samples: int = 1,
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
) -> M:
    """The Fisher information matrix by ``samples`` labels an example, drawn from the model: unbiased, a backward each.

    Draws are keyed by (a seed taken from ``generator``, the running index of the example, the sample), so that they do
    not depend on the batch size; over several processes the seed is that of rank 0, and examples are numbered in rank
    order. ``index(batch) -> (n,)`` gives the examples' own numbers instead: draws then depend neither on the order nor
    on who sees an example. ``representation``, its ``options``, ``likelihood``, ``checkpoint`` (whose folder keeps the
    seed too), ``every``, other arguments and errors as for :func:`FIM`.
    """
    require_known(FIM_MonteCarlo, representation, options)
    asked = Asked.of(checkpoint, every, drawn=generator is None)
    cotangents = MonteCarloFisher(as_likelihood(likelihood, model), require_samples(samples), seed_of(generator))
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
    policy = Policy("FIM_MonteCarlo", reread=False)
    return cast(M, measured(run, cotangents, representation, options, policy, index=index, asked=asked))


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
    checkpoint: str | os.PathLike[str] | None = None,
    every: float = 10.0,
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
        checkpoint: a folder for the sums, as for :func:`FIM`.
        every: minutes, as for :func:`FIM`.
        options: of the representation.

    Raises :class:`OutputError` on targets that do not fit; other arguments and errors as for :func:`FIM`.
    """
    require_known(EmpiricalFIM, representation, options)
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
    cotangents = EmpiricalFisher(as_loss(loss, model))
    policy = Policy("EmpiricalFIM", reread=True)
    return cast(M, measured(run, cotangents, representation, options, policy, asked=asked))
