"""Kernels of a model: the same sweeps as the parameter space, read the other way."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.cotangents.fisher import seed_of
from nngeom.cotangents.loss import EveryOutput
from nngeom.fmat.dense import FMatBlockDiag, FMatDense
from nngeom.fmat.diag import FMatDiag
from nngeom.fmat.estimate import KernelEstimate, RandomSigns, TraceEstimate, kernel_estimate
from nngeom.fmat.fingerprint import Fingerprint
from nngeom.fmat.fmat import FMat
from nngeom.fmat.implicit import FMatImplicit
from nngeom.fmat.jacobian_products import first_look
from nngeom.fmat.operator import FunctionOperator
from nngeom.fmat.products import EVERYTHING, Grouping, build
from nngeom.fmat.side import Side
from nngeom.fmat.store import FileStore
from nngeom.measures.probed import require_samples
from nngeom.space.collection import LayerCollection
from nngeom.sweep.columns import Cotangents
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Policy

K = TypeVar("K", bound=FunctionOperator, default=FMatDense)


# fmt: off
@overload
def GramMatrix(model: nn.Module, loader: Any, representation: type[K] = ..., *,
        other: Any = None, function: Callable[..., Tensor] | None = None,
        layer_collection: LayerCollection | None = None, centered: bool = False, differentiable: bool = False,
        estimator: None = None, samples: int = 1, generator: torch.Generator | None = None,
        out: str | os.PathLike[str] | None = None, progress: bool = False, memory_budget: int | None = None,
        check: bool = True, process_group: Any = None) -> K: ...
@overload
def GramMatrix(model: nn.Module, loader: Any, representation: type[FMatDense] = FMatDense, *,
        other: Any = None, function: Callable[..., Tensor] | None = None,
        layer_collection: LayerCollection | None = None, centered: bool = False, differentiable: bool = False,
        estimator: Literal["rademacher"], samples: int = 1, generator: torch.Generator | None = None,
        out: str | os.PathLike[str] | None = None, progress: bool = False, memory_budget: int | None = None,
        check: bool = True, process_group: Any = None) -> KernelEstimate: ...
@overload
def GramMatrix(model: nn.Module, loader: Any, representation: type[FMatDiag], *,
        other: Any = None, function: Callable[..., Tensor] | None = None,
        layer_collection: LayerCollection | None = None, centered: bool = False, differentiable: bool = False,
        estimator: Literal["rademacher"], samples: int = 1, generator: torch.Generator | None = None,
        out: str | os.PathLike[str] | None = None, progress: bool = False, memory_budget: int | None = None,
        check: bool = True, process_group: Any = None) -> TraceEstimate: ...
# fmt: on
def GramMatrix(
    model: nn.Module,
    loader: Any,
    representation: Any = FMatDense,
    *,
    other: Any = None,
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
) -> Any:
    """The Gram matrix of the gradients of all outputs (the empirical neural tangent kernel), not normalised: ``K = J
    J^T``.

    ``K.tensor[k, n, l, m] = <d f_k(x_n) / dw, d f_l(x_m) / dw>``, ``(c, n, c, m)``; rows keep the order of the loader.

    ``representation``: ``FMatDense``; ``FMatBlockDiag``, one block ``(n, m)`` an output; ``FMatDiag``, squared norms
    ``(c, n)`` without any kernel; ``FMatImplicit``, products only. ``other``: a second loader, whose examples are the
    columns. ``centered``: the mean gradient of each output over the examples of the first loader is subtracted on both
    sides. ``differentiable``: the kernel keeps its graph, so that ``K.trace().backward()`` reaches the parameters.

    ``estimator="rademacher"`` replaces the sum over outputs by ``samples`` draws (by ``generator``, torch's global one
    by default) of random output signs, one backward pass each: with ``FMatDiag`` a :class:`TraceEstimate`, whose
    ``trace()`` has a standard error; with ``FMatDense`` a :class:`KernelEstimate` of ``sum_k K[k, n, k, m]``, for
    models with very many outputs.

    ``out``: a path; an ``FMatDense`` is written to the ``.npy`` file ``path`` tile by tile, beside which an interrupted
    run lies (``path + ".part"``, ``".tiles"``) until the same call resumes it. A finished file is opened by the same
    call, read once to verify it, and never written again; ``ArgumentError`` says what differs where inputs, parameters,
    options or outputs do, ``FileError`` that the file is damaged or foreign, the disk full, or another process at work
    on it. The tensor is mapped from the file: writing to it changes it for this process only. ``memory_budget`` in
    bytes cuts the work into tiles and does not change the result.

    Raises :class:`LoaderError`, :class:`OutputError`, :class:`ModeError`, :class:`CoverageError`,
    :class:`NonFiniteError`,
    :class:`ArgumentError`, :class:`FileError`. Source: Jacot et al. 2018; Baratin et al. 2021, eq. 1; George 2023,
    thesis, section 3.2.3.
    """
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
    kind = _representation(representation)
    cotangents: Cotangents = EveryOutput()
    policy = Policy("GramMatrix", keep_graph=differentiable, watch=kind is FMatImplicit)
    if estimator is not None:
        cotangents = _signs(
            kind,
            estimator,
            samples,
            generator,
            plain=not centered and out is None and (kind is not FMatDiag or other is None),
        )
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
    side = lambda data: Side.of(run.silent().on(data), cotangents, policy)
    with run.within(), torch.set_grad_enabled(differentiable):
        if out is not None:
            return _in_file(out, side, loader, other, centered=centered, progress=progress)
        rows, columns = side(loader), None if other is None else side(other)
        if estimator is not None:
            return _estimated(kind, rows, columns, progress=progress)
        if kind is FMatImplicit:
            first_look(rows)
            if columns is not None:
                first_look(columns)
            return FMatImplicit(rows, columns or rows, centered)
        return build(kind, rows, columns, EVERYTHING, centered=centered, progress=progress)[""]


def _in_file(
    out: Any, side: Callable[[Any], Side], loader: Any, other: Any, *, centered: bool, progress: bool
) -> FMatDense:
    """The kernel of a file, computed unless it is there; whether that can be written is known before any batch is
    read.
    """
    with FileStore(out) as store:
        rows, columns = side(loader), None if other is None else side(other)
        about = Fingerprint.of(rows, columns, centered=centered)
        shape = FMatDense.sizes(rows.outputs, rows.examples, (columns or rows).examples)
        there = store.begin(shape, rows.kept, about)
        if there is not None:
            return FMatDense(there[""])
        return build(FMatDense, rows, columns, EVERYTHING, centered=centered, store=store, progress=progress)[""]


def GramMatrices(
    model: nn.Module,
    loader: Any,
    representation: type[K] = FMatDense,  # type: ignore[assignment]
    *,
    other: Any = None,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    centered: bool = False,
    differentiable: bool = False,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
) -> dict[str, K]:
    """One Gram matrix a layer, ``{layer: kernel}``, in the same sweep; they sum to :func:`GramMatrix`.

    A layer is the module that owns a parameter under its first name. ``representation`` (not ``FMatImplicit``),
    ``other``, ``centered``, ``differentiable``, other arguments and errors as for :func:`GramMatrix`.
    """
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
    kind = _representation(representation)
    if kind is FMatImplicit:
        raise ArgumentError(
            "GramMatrices holds its kernels; expected FMatDense, FMatBlockDiag or FMatDiag (FMatImplicit: "
            "GramMatrix with a layer_collection)"
        )
    policy = Policy("GramMatrices", keep_graph=differentiable, watch=False)
    side = lambda data: Side.of(run.silent().on(data), EveryOutput(), policy)
    grouping = Grouping(tuple(run.network.collection.by_layer()), run.network.layer_of)
    with run.within(), torch.set_grad_enabled(differentiable):
        columns = None if other is None else side(other)
        return build(kind, side(loader), columns, grouping, centered=centered, progress=progress)


def _signs(kind: Any, estimator: str, samples: int, generator: torch.Generator | None, *, plain: bool) -> RandomSigns:
    """Random signs of the outputs; ``plain``: nothing else is asked for that does not go with them."""
    if estimator != "rademacher":
        raise ArgumentError(f"estimator is {estimator!r}; expected 'rademacher', or None for all outputs")
    if kind not in (FMatDiag, FMatDense) or not plain:
        raise ArgumentError(
            "estimator='rademacher' goes with FMatDiag (the trace) or FMatDense (the kernel summed over "
            "outputs), without centered= or out="
        )
    return RandomSigns(require_samples(samples), seed_of(generator), shared=kind is FMatDense)


def _estimated(kind: Any, rows: Side, columns: Side | None, *, progress: bool) -> TraceEstimate | KernelEstimate:
    if kind is FMatDiag:
        return TraceEstimate(build(FMatDiag, rows, None, EVERYTHING)[""].tensor)
    return kernel_estimate(build(FMatBlockDiag, rows, columns, EVERYTHING, progress=progress)[""].tensor)


def _representation(representation: Any) -> Any:
    if representation is FMatImplicit or (
        isinstance(representation, type) and issubclass(representation, FMat) and representation is not FMat
    ):
        return representation
    raise ArgumentTypeError(
        f"representation is {representation!r}; expected FMatDense, FMatBlockDiag, FMatDiag or FMatImplicit"
    )
