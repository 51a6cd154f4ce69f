"""Kernels layer by layer, in one sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.core.errors import ArgumentError, StructureError
from nngeom.cotangents.loss import EmpiricalFisher, EveryOutput, Loss, as_loss
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.implicit import FMatImplicit
from nngeom.fmat.kernels import kernels
from nngeom.fmat.operator import FunctionOperator
from nngeom.fmat.products import Grouping
from nngeom.fmat.sharded import FMatSharded
from nngeom.fmat.side import Side
from nngeom.measures.kernels import kernel_kind, require_same_kernel
from nngeom.measures.sharded_kernels import sharded_kernels
from nngeom.measures.within import collection_of, in_metric
from nngeom.pmat.operator import ParameterOperator
from nngeom.space.collection import LayerCollection
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Policy

K = TypeVar("K", bound=FunctionOperator, default=FMatDense)


# fmt: off
@overload
def GramMatrices(model: nn.Module, loader: Any, representation: type[K] = ..., *,
        other: Any = None, loss: str | Loss | Callable[[Tensor, Any], Tensor] | None = None,
        metric: ParameterOperator | None = None, function: Callable[..., Tensor] | None = None,
        layer_collection: LayerCollection | None = None, centered: bool = False, differentiable: bool = False,
        progress: bool = False, memory_budget: int | None = None, check: bool = True, process_group: Any = None,
        sharded: Literal[False] = False) -> dict[str, K]: ...
@overload
def GramMatrices(model: nn.Module, loader: Any, representation: type[FMatDense] = FMatDense, *,
        other: Any = None, loss: str | Loss | Callable[[Tensor, Any], Tensor] | None = None,
        metric: ParameterOperator | None = None, function: Callable[..., Tensor] | None = None,
        layer_collection: LayerCollection | None = None, centered: bool = False, differentiable: bool = False,
        progress: bool = False, memory_budget: int | None = None, check: bool = True, process_group: Any = None,
        sharded: Literal[True]) -> dict[str, FMatSharded]: ...
# fmt: on
def GramMatrices(
    model: nn.Module,
    loader: Any,
    representation: Any = FMatDense,
    *,
    other: Any = None,
    loss: str | Loss | Callable[[Tensor, Any], Tensor] | None = None,
    metric: ParameterOperator | None = None,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    centered: bool = False,
    differentiable: bool = False,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
    sharded: bool = False,
) -> Any:
    """One Gram matrix a layer, ``{layer: kernel}``, in the same sweep; they sum to :func:`GramMatrix`.

    A layer is the module that owns a parameter under its first name. ``representation`` (not ``FMatImplicit``),
    ``other``, ``loss``, ``metric``, ``centered``, ``differentiable``, ``sharded``, other arguments and errors as for
    :func:`GramMatrix`; :class:`StructureError` for a metric with entries between layers, under which kernels of layers
    do not sum to the whole.
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
    if kind is FMatImplicit:
        raise ArgumentError(
            "GramMatrices holds its kernels; expected FMatDense, FMatBlockDiag or FMatDiag (FMatImplicit: "
            "GramMatrix with a layer_collection)"
        )
    if sharded and (kind is not FMatDense or differentiable):
        raise ArgumentError("sharded=True is of FMatDense, without differentiable=; leave one of them out")
    within = in_metric(run, metric, wide=centered)
    if within is not None and within.spans_layers:
        raise StructureError(
            f"the metric, a {type(metric).__name__}, has entries between layers, so that kernels of layers do not sum "
            "to the whole; use one of blocks that lie in layers, or GramMatrix"
        )
    cotangents: Cotangents = EveryOutput() if loss is None else EmpiricalFisher(as_loss(loss, model))
    policy = Policy(
        "GramMatrices", part_of=None if within is None else within.part_of, keep_graph=differentiable, watch=False
    )
    side = lambda data: Side.of(run.silent().on(data), cotangents, policy)
    grouping = Grouping(tuple(run.network.collection.by_layer()), run.network.layer_of)
    with run.within(), torch.set_grad_enabled(differentiable):
        with run.team.together("batches"):
            rows, columns = side(loader), None if other is None else side(other)
        if run.team.size > 1:
            how = {"centered": centered, "other": other is not None, "differentiable": differentiable}
            require_same_kernel(run, "GramMatrices", kind, cotangents, metric, **how)
        if sharded:
            return sharded_kernels(rows, columns, grouping, centered=centered, metric=within)
        return kernels(kind, rows, columns, grouping, centered=centered, metric=within, progress=progress)
