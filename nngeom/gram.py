"""Kernels and Jacobians of a model: the same sweeps as the parameter space, read the other way."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core import memory
from nngeom.core.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from nngeom.fmat.dense import FMatBlockDiag, FMatDense
from nngeom.fmat.diag import FMatDiag
from nngeom.fmat.estimate import RandomSigns, TraceEstimate, kernel_estimate
from nngeom.fmat.fingerprint import Fingerprint
from nngeom.fmat.fmat import FMat
from nngeom.fmat.implicit import FMatImplicit, pull
from nngeom.fmat.products import EVERYTHING, Grouping, build
from nngeom.fmat.store import FileStore
from nngeom.fmat.tiles import Side
from nngeom.generator.sweep import Metric, Sweep
from nngeom.generator.task import Task
from nngeom.maps.pull_back import PullBackDense, PullBackImplicit
from nngeom.maps.push_forward import PushForwardDense, PushForwardImplicit, dense_rows
from nngeom.metrics.fisher import seed_of
from nngeom.metrics.loss import IdentityMetric
from nngeom.space.collection import LayerCollection


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

    ``estimator="rademacher"`` replaces the sum over outputs by ``samples`` draws of random output signs, one backward
    pass each: with ``FMatDiag`` a :class:`TraceEstimate`, whose ``trace()`` has a standard error; with ``FMatDense`` a
    :class:`KernelEstimate` of ``sum_k K[k, n, k, m]``, for models with very many outputs.

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
    _require_alone(process_group)
    kind = _representation(representation)
    with _settings(memory_budget, differentiable):
        task = Task.build(model, function, layer_collection)
        if estimator is not None:
            return _estimate(
                task, loader, other, kind, estimator, samples, generator, centered, differentiable, out, progress, check
            )
        side = lambda data: _side(
            task, data, IdentityMetric(), differentiable, progress, check, watch=kind is FMatImplicit
        )
        if kind is FMatImplicit:
            _refuse_with_implicit(differentiable, out)
        if out is not None:
            if kind is not FMatDense or differentiable:
                raise ArgumentError(
                    f"out= writes an FMatDense without graph; got {kind.__name__} with differentiable={differentiable}"
                )
            return _in_file(out, side, loader, other, centered=centered, progress=progress)
        rows, columns = side(loader), None if other is None else side(other)
        if kind is FMatImplicit:
            _first_look(rows, columns)
            return FMatImplicit(rows, columns or rows, centered)
        if kind is FMatDiag and columns is not None:
            raise ArgumentError(
                "a kernel between two sets of examples has no diagonal; use FMatDense or FMatBlockDiag with other="
            )
        return build(kind, rows, columns, EVERYTHING, centered, None, progress)[""]


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
        return build(FMatDense, rows, columns, EVERYTHING, centered, store, progress)[""]


def GramMatrices(
    model: nn.Module,
    loader: Any,
    representation: Any = FMatDense,
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
) -> dict[str, Any]:
    """One Gram matrix a layer, ``{layer: kernel}``, in the same sweep; they sum to :func:`GramMatrix`.

    A layer is the module that owns a parameter under its first name. Arguments and errors as :func:`GramMatrix`.
    """
    _require_alone(process_group)
    kind = _representation(representation)
    if kind is FMatImplicit:
        raise ArgumentError(
            "GramMatrices holds its kernels; expected FMatDense, FMatBlockDiag or FMatDiag (FMatImplicit: "
            "GramMatrix with a layer_collection)"
        )
    with _settings(memory_budget, differentiable):
        task = Task.build(model, function, layer_collection)
        side = lambda data: _side(task, data, IdentityMetric(), differentiable, progress, check)
        grouping = Grouping(tuple(task.collection.by_layer()), task.layer_of)
        return build(kind, side(loader), None if other is None else side(other), grouping, centered, None, progress)


def Jacobian(
    model: nn.Module,
    loader: Any,
    representation: Any = PushForwardDense,
    *,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
) -> Any:
    """The Jacobian of all outputs at all examples, ``(c, n, d)``, as a map between parameter and function space.

    ``representation``: ``PushForwardDense`` or ``PushForwardImplicit`` (``J v``), ``PullBackDense`` or
    ``PullBackImplicit`` (``J^T u``); ``.T`` links them. ``J @ J.T`` is a kernel, ``J.T @ J`` a matrix over the
    parameters. Other arguments and errors as :func:`GramMatrix`.
    """
    _require_alone(process_group)
    with memory.limit(memory_budget):
        task = Task.build(model, function, layer_collection)
        side = _side(task, loader, IdentityMetric(), False, progress, check, True, "Jacobian")
        if representation in (PushForwardImplicit, PullBackImplicit):
            _first_look(side, None)
            return representation(side)
        if representation not in (PushForwardDense, PullBackDense):
            raise ArgumentTypeError(
                f"representation is {representation!r}; expected PushForwardDense, PushForwardImplicit, "
                "PullBackDense or PullBackImplicit"
            )
        return representation(task.collection, dense_rows(side))


@contextlib.contextmanager
def _settings(memory_budget: int | None, differentiable: bool):
    """The budget, and gradients only where asked for."""
    with memory.limit(memory_budget), torch.set_grad_enabled(differentiable):
        yield


def _side(
    task: Task,
    data: Any,
    metric: Metric,
    differentiable: bool,
    progress: bool,
    check: bool,
    watch: bool = False,
    label: str = "GramMatrix",
) -> Side:
    shown = progress and label != "GramMatrix"
    sweep = Sweep(task, data, metric, memory.budget(), check, shown, keep_graph=differentiable, label=label)
    return Side(sweep, watch=watch)


def _first_look(rows: Side, columns: Side | None) -> None:
    """Refuse now what products would only meet later: models that mix examples, odd batches, NaN and infinity."""
    for side in (rows, columns):
        if side is not None and side.sweep.check:
            for index, batch in enumerate(side.sweep.loader):
                side.sweep.look(batch, index)
            ones = torch.ones(side.outputs, side.examples, dtype=side.dtype, device=side.device)
            if not bool(torch.isfinite(pull(side, ones).sum())):
                side.sweep.blame()


def _estimate(
    task, loader, other, kind, estimator, samples, generator, centered, differentiable, out, progress, check
) -> Any:
    if estimator != "rademacher":
        raise ArgumentError(f"estimator is {estimator!r}; expected 'rademacher', or None for all outputs")
    if not isinstance(samples, int) or samples < 1:
        raise ArgumentError(f"samples is {samples!r}; expected a whole number of at least 1")
    if kind not in (FMatDiag, FMatDense) or centered or out is not None or (kind is FMatDiag and other is not None):
        raise ArgumentError(
            "estimator='rademacher' goes with FMatDiag (the trace) or FMatDense (the kernel summed over "
            "outputs), without centered= or out="
        )
    metric = RandomSigns(samples, seed_of(generator), shared=kind is FMatDense)
    side = lambda data: _side(task, data, metric, differentiable, progress, check)
    if kind is FMatDiag:
        return TraceEstimate(build(FMatDiag, side(loader), None, EVERYTHING)[""].tensor)
    draws = build(FMatBlockDiag, side(loader), None if other is None else side(other), EVERYTHING, progress=progress)[
        ""
    ]
    return kernel_estimate(draws.tensor)


def _refuse_with_implicit(differentiable: bool, out: Any) -> None:
    if differentiable or out is not None:
        raise ArgumentError("FMatImplicit takes neither differentiable= nor out=; use FMatDense")


def _representation(representation: Any) -> Any:
    if representation is FMatImplicit or (
        isinstance(representation, type) and issubclass(representation, FMat) and representation is not FMat
    ):
        return representation
    raise ArgumentTypeError(
        f"representation is {representation!r}; expected FMatDense, FMatBlockDiag, FMatDiag or FMatImplicit"
    )


def _require_alone(process_group: Any) -> None:
    if process_group is not None:
        raise UnsupportedError(
            "process_group is not available yet; pass process_group=None and merge shards afterwards"
        )
