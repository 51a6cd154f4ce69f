"""Kernels of a model: the same sweeps as the parameter space, read the other way."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.cotangents.loss import EmpiricalFisher, EveryOutput, Loss, as_loss
from nngeom.fmat.by_position import PositionKernel, positioned, require_alone
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.diag import FMatDiag
from nngeom.fmat.estimate import KernelEstimate, RandomSigns, TraceEstimate
from nngeom.fmat.fmat import FMat
from nngeom.fmat.implicit import FMatImplicit
from nngeom.fmat.jacobian_products import first_look
from nngeom.fmat.kernels import kernels
from nngeom.fmat.operator import FunctionOperator
from nngeom.fmat.products import EVERYTHING
from nngeom.fmat.sharded import FMatSharded
from nngeom.fmat.side import Side
from nngeom.measures.kernel_estimates import estimated, signs
from nngeom.measures.kernel_files import in_file, in_file_of_all
from nngeom.measures.sharded_kernels import sharded_kernels
from nngeom.measures.within import collection_of, in_metric
from nngeom.pmat.operator import ParameterOperator
from nngeom.space.collection import LayerCollection
from nngeom.sweep.agreement import agree
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Policy

K = TypeVar("K", bound=FunctionOperator, default=FMatDense)


# fmt: off
@overload
def GramMatrix(model: nn.Module, loader: Any, representation: type[K] = ..., *,
        other: Any = None, loss: str | Loss | Callable[[Tensor, Any], Tensor] | None = None,
        metric: ParameterOperator | None = None, by_position: Literal[False] = False,
        function: Callable[..., Tensor] | None = None, layer_collection: LayerCollection | None = None,
        centered: bool = False, differentiable: bool = False, estimator: None = None, samples: int = 1,
        generator: torch.Generator | None = None, out: str | os.PathLike[str] | None = None, progress: bool = False,
        memory_budget: int | None = None, check: bool = True, process_group: Any = None,
        sharded: Literal[False] = False) -> K: ...
@overload
def GramMatrix(model: nn.Module, loader: Any, representation: type[FMatDense] = FMatDense, *,
        other: Any = None, loss: str | Loss | Callable[[Tensor, Any], Tensor] | None = None,
        metric: ParameterOperator | None = None, by_position: Literal[False] = False,
        function: Callable[..., Tensor] | None = None, layer_collection: LayerCollection | None = None,
        centered: bool = False, differentiable: bool = False, estimator: Literal["rademacher"], samples: int = 1,
        generator: torch.Generator | None = None, out: str | os.PathLike[str] | None = None, progress: bool = False,
        memory_budget: int | None = None, check: bool = True, process_group: Any = None,
        sharded: Literal[False] = False) -> KernelEstimate: ...
@overload
def GramMatrix(model: nn.Module, loader: Any, representation: type[FMatDiag], *,
        other: Any = None, loss: str | Loss | Callable[[Tensor, Any], Tensor] | None = None,
        metric: ParameterOperator | None = None, by_position: Literal[False] = False,
        function: Callable[..., Tensor] | None = None, layer_collection: LayerCollection | None = None,
        centered: bool = False, differentiable: bool = False, estimator: Literal["rademacher"], samples: int = 1,
        generator: torch.Generator | None = None, out: str | os.PathLike[str] | None = None, progress: bool = False,
        memory_budget: int | None = None, check: bool = True, process_group: Any = None,
        sharded: Literal[False] = False) -> TraceEstimate: ...
@overload
def GramMatrix(model: nn.Module, loader: Any, representation: type[FMatDense] = FMatDense, *,
        other: Any = None, loss: str | Loss | Callable[[Tensor, Any], Tensor] | None = None,
        metric: ParameterOperator | None = None, by_position: Literal[True],
        function: Callable[..., Tensor] | None = None, layer_collection: LayerCollection | None = None,
        centered: bool = False, differentiable: bool = False, estimator: None = None, samples: int = 1,
        generator: torch.Generator | None = None, out: str | os.PathLike[str] | None = None, progress: bool = False,
        memory_budget: int | None = None, check: bool = True, process_group: Any = None,
        sharded: Literal[False] = False) -> PositionKernel: ...
@overload
def GramMatrix(model: nn.Module, loader: Any, representation: type[FMatDense] = FMatDense, *,
        other: Any = None, loss: str | Loss | Callable[[Tensor, Any], Tensor] | None = None,
        metric: ParameterOperator | None = None, by_position: Literal[False] = False,
        function: Callable[..., Tensor] | None = None, layer_collection: LayerCollection | None = None,
        centered: bool = False, differentiable: bool = False, estimator: None = None, samples: int = 1,
        generator: torch.Generator | None = None, out: str | os.PathLike[str] | None = None, progress: bool = False,
        memory_budget: int | None = None, check: bool = True, process_group: Any = None,
        sharded: Literal[True]) -> FMatSharded: ...
# fmt: on
def GramMatrix(
    model: nn.Module,
    loader: Any,
    representation: Any = FMatDense,
    *,
    other: Any = None,
    loss: str | Loss | Callable[[Tensor, Any], Tensor] | None = None,
    metric: ParameterOperator | None = None,
    by_position: bool = False,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    centered: bool = False,
    differentiable: bool = False,
    estimator: str | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
    sharded: bool = False,
) -> Any:
    """The Gram matrix of the gradients of all outputs (the empirical neural tangent kernel), not normalised: ``K = J
    J^T``; in a metric ``K = J M J^T``.

    ``K.tensor[k, n, l, m] = <d f_k(x_n) / dw, d f_l(x_m) / dw>``, ``(c, n, c, m)``; rows keep the order of the loader.

    ``representation``: ``FMatDense``; ``FMatBlockDiag``, one block ``(n, m)`` an output; ``FMatDiag``, squared norms
    ``(c, n)`` without any kernel; ``FMatImplicit``, products only. ``other``: a second loader, whose examples are the
    columns. ``centered``: the mean gradient of each output over the examples of the first loader is subtracted on both
    sides. ``differentiable``: the kernel keeps its graph, so that ``K.trace().backward()`` reaches the parameters.

    ``loss``: rows are the gradients of each example's loss (as for :func:`EmpiricalFIM`), ``c = 1``. ``metric``: a
    matrix ``M`` over the parameters between the two sides, such as ``F.inverse(damping)``, a constant to gradients;
    ``layer_collection`` then is its own. Under KFAC, EKFAC and diagonal matrices rows stay in the structure that they
    have and memory does not depend on their number; under others ``M J`` is formed, a few examples at a time.
    ``by_position``: what every position of the columns adds, a :class:`PositionKernel` of ``(c, n, c, m, t)``.

    ``estimator="rademacher"`` replaces the sum over outputs by ``samples`` draws (by ``generator``, torch's global one
    by default) of random output signs, one backward pass each: with ``FMatDiag`` a :class:`TraceEstimate`, whose
    ``trace()`` has a standard error; with ``FMatDense`` a :class:`KernelEstimate` of ``sum_k K[k, n, k, m]``, for
    models with very many outputs.

    ``out``: a path; an ``FMatDense`` is written to the ``.npy`` file ``path`` tile by tile, beside which an interrupted
    run lies (``path + ".part"``, ``".tiles"``) until the same call resumes it. A finished file is opened by the same
    call, read once to verify it, and never written again; ``ArgumentError`` says what differs where inputs, parameters,
    options or outputs do, ``FileError`` that the file is damaged or foreign, the disk full, or another process at work
    on it. The tensor is mapped from the file: writing to it changes it for this process only. Several processes write
    one file, which all see. ``memory_budget`` in
    bytes cuts the work into tiles and does not change the result.

    Over the processes of ``process_group`` examples are in rank order, and the kernel is whole on all of them
    (:class:`SizeError` where it does not fit ``memory_budget``, but in a file); with ``sharded`` each keeps the rows of
    its own, an :class:`FMatSharded`. The gradient of a ``differentiable`` one is that of one process, the same on all,
    which run the backward pass together.

    Raises :class:`LoaderError`, :class:`OutputError`, :class:`ModeError`, :class:`CoverageError`,
    :class:`NonFiniteError`, :class:`StructureError`, :class:`ArgumentError`, :class:`FileError`. Source: Jacot et al.
    2018; Baratin et al. 2021, eq. 1; George 2023, thesis, section 3.2.3.
    """
    run = Run.of(
        model,
        loader,
        function=function,
        layer_collection=collection_of(metric, layer_collection),
        progress=progress,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
        parts=not differentiable,
    )
    kind = kernel_kind(representation)
    whole = (differentiable, estimator, out, by_position)
    if sharded and (kind is not FMatDense or any(x is not None and x is not False for x in whole)):
        raise ArgumentError(
            "sharded=True is of FMatDense, without differentiable=, estimator=, out= and by_position=; leave one of "
            "them out"
        )
    cotangents: Cotangents = EveryOutput() if loss is None else EmpiricalFisher(as_loss(loss, model))
    within = in_metric(run, metric, wide=centered)
    policy = Policy(
        "GramMatrix",
        part_of=None if within is None else within.part_of,
        keep_graph=differentiable,
        watch=kind is FMatImplicit,
    )
    if (loss is not None or metric is not None) and (kind is FMatImplicit or estimator is not None):
        raise ArgumentError(
            "loss= and metric= go with FMatDense, FMatBlockDiag or FMatDiag and every row exact; expected neither "
            "FMatImplicit nor estimator="
        )
    if estimator is not None:
        plain = not centered and out is None and (kind is not FMatDiag or other is None)
        cotangents = signs(kind, estimator, samples, generator, plain=plain)
    elif kind is FMatImplicit and (differentiable or out is not None):
        raise ArgumentError("FMatImplicit takes neither differentiable= nor out=; use FMatDense")
    elif other is not None and kind is not FMatImplicit and kind.diagonal:
        raise ArgumentError(
            "a kernel between two sets of examples has no diagonal; use FMatDense or FMatBlockDiag with other="
        )
    elif out is not None and (kind is not FMatDense or differentiable):
        raise ArgumentError(
            f"out= writes an FMatDense without graph; got {kind.__name__} with differentiable={differentiable}"
        )
    if by_position:
        require_alone(centered, differentiable, estimator, out, None if kind is FMatDense else kind)
    side = lambda data: Side.of(run.silent().on(data), cotangents, policy)
    with run.within(), torch.set_grad_enabled(differentiable):
        if run.team.size > 1:
            how = {"centered": centered, "other": other is not None, "by_position": by_position}
            require_same_kernel(run, "GramMatrix", kind, cotangents, metric, differentiable=differentiable, **how)
        if out is not None:
            if run.team.size > 1:
                return in_file_of_all(out, side, loader, other, run.team, centered=centered, metric=within)
            return in_file(out, side, loader, other, centered=centered, metric=within, progress=progress)
        with run.team.together("batches"):
            rows, columns = side(loader), None if other is None else side(other)
        if by_position:
            return positioned(rows, columns or side(rows.run.loader), within, progress=progress)
        if estimator is not None:
            return estimated(kind, rows, columns, progress=progress)
        if kind is FMatImplicit:
            rows, columns = rows.placed(), None if columns is None else columns.placed()
            first_look(rows)
            if columns is not None:
                first_look(columns)
            return FMatImplicit(rows, columns or rows, centered)
        if sharded:
            return sharded_kernels(rows, columns, EVERYTHING, centered=centered, metric=within)[""]
        return kernels(kind, rows, columns, EVERYTHING, centered=centered, metric=within, progress=progress)[""]


def require_same_kernel(run: Run, what: str, kind: Any, cotangents: Cotangents, metric: Any, **how: bool) -> None:
    """Raise :class:`RankMismatchError` unless all processes are to compute the same kernel; ``how``: other arguments of
    the call.
    """
    rows = replace(cotangents, seed=0) if isinstance(cotangents, RandomSigns) else cotangents
    agree(run, what, representation=kind, rows=rows, metric=metric, **how)


def kernel_kind(representation: Any) -> Any:
    """The class of kernels that is asked for; raises :class:`ArgumentTypeError` for what is none."""
    if representation is FMatImplicit or (
        isinstance(representation, type) and issubclass(representation, FMat) and representation is not FMat
    ):
        return representation
    raise ArgumentTypeError(
        f"representation is {representation!r}; expected FMatDense, FMatBlockDiag, FMatDiag or FMatImplicit"
    )
