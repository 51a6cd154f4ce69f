"""Gram matrices of the gradients (empirical tangent kernels): the same sweeps as the parameter space, read the other way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core import memory
from nngeom.core.errors import UnsupportedError
from nngeom.fmat.dense import FMatDense
from nngeom.fmat.diag import FMatDiag
from nngeom.fmat.tiles import Side, matched, pairs, span
from nngeom.generator.sweep import Sweep
from nngeom.generator.task import Task
from nngeom.maps.push_forward import PushForwardDense
from nngeom.metrics.loss import IdentityMetric
from nngeom.pmat.implicit import math_attention
from nngeom.pmat.recipe import write_rows
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
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
) -> Any:
    """The Gram matrix of the gradients of all outputs, ``K[k, n, l, m] = <d f_k(x_n)/dw, d f_l(x_m)/dw>``, not normalised.

    ``other``: a second loader, whose examples are the columns. ``centered``: the mean gradient of each output over the
    examples of the first loader is subtracted on both sides. ``differentiable``: the kernel keeps its graph.
    """
    groups = _kernels(
        model, loader, representation, other, function, layer_collection, centered, differentiable, progress, memory_budget, check, process_group, False
    )  # fmt: skip
    return groups[""]


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
    """One Gram matrix a layer, in the same sweep, summing to :func:`GramMatrix`: ``{layer: kernel}``."""
    return _kernels(
        model, loader, representation, other, function, layer_collection, centered, differentiable, progress, memory_budget, check, process_group, True
    )  # fmt: skip


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
    """The Jacobian of all outputs at all examples, ``(c, n, d)``, as a map between parameter and function space."""
    if process_group is not None:
        raise UnsupportedError("process_group is not available yet; pass process_group=None and merge shards afterwards")
    task = Task.build(model, function, layer_collection)
    with memory.limit(memory_budget), torch.no_grad():
        side = Side(Sweep(task, loader, IdentityMetric(), memory_budget, check, progress, label="Jacobian"))
        out: Tensor | None = None
        for chunk in side.chunks():
            k, n = span(chunk)
            if out is None:
                out = torch.zeros(chunk.outputs[1], side.examples, task.collection.numel, dtype=side.dtype, device=side.device)
            for layout, j in chunk.jacobians.items():
                write_rows(out[k, n], j, layout)
    return representation(task.collection, out)


def _kernels(
    model, loader, representation, other, function, layer_collection, centered, differentiable, progress, memory_budget, check, process_group, by_layer
) -> dict[str, Any]:
    if process_group is not None:
        raise UnsupportedError("process_group is not available yet; pass process_group=None and merge shards afterwards")
    task = Task.build(model, function, layer_collection)
    attention = math_attention() if differentiable else contextlib.nullcontext()
    with memory.limit(memory_budget), attention, torch.set_grad_enabled(differentiable):
        side = lambda data: Side(Sweep(task, data, IdentityMetric(), memory_budget, check, progress, keep_graph=differentiable, label="GramMatrix"))
        rows, columns = side(loader), None if other is None else side(other)
        layers = tuple(task.collection.by_layer()) if by_layer else ("",)
        layer_of = task.layer_of if by_layer else lambda name: ""
        if representation is FMatDiag:
            tensors = squared_norms(rows, layers, layer_of)
        else:
            tensors = products(representation, rows, columns, layers, layer_of, differentiable)
    return {layer: representation(t) for layer, t in tensors.items()}


def squared_norms(rows: Side, layers: tuple[str, ...], layer_of: Callable[[str], str]) -> dict[str, Tensor]:
    """``{layer: (c, n)}``: the squared norms of the gradients; no kernel is formed."""
    parts: dict[str, dict[int, list[Tensor]]] = {layer: {} for layer in layers}
    for chunk in rows.chunks():
        k, _ = span(chunk)
        totals = {layer: torch.zeros(k.stop - k.start, chunk.examples, dtype=rows.dtype, device=rows.device) for layer in layers}
        for layout, j in chunk.jacobians.items():
            layer = layer_of(layout.names[0])
            totals[layer] = totals[layer] + j.squared_norms()
        for layer, t in totals.items():
            parts[layer].setdefault(chunk.start, []).append(t)
    return {layer: torch.cat([torch.cat(outputs) for outputs in examples.values()], 1) for layer, examples in parts.items()}


def products(
    kind: Any, rows: Side, columns: Side | None, layers: tuple[str, ...], layer_of: Callable[[str], str], differentiable: bool
) -> dict[str, Tensor]:
    """``{layer: tensor}`` of a kernel representation, tile by tile; the lower half of a square kernel is mirrored."""
    out: dict[str, Tensor] = {}
    m = (columns or rows).examples
    for x, y in pairs(rows, columns):
        (k, n), (l, q) = span(x), span(y)
        place = kind.place(k, n, l, q)
        if any(s.stop <= s.start for s in place):
            continue
        tiles: dict[str, Tensor] = {}
        for layer, jx, jy in matched(x, y, layer_of):
            part = kind.product(jx, jy, k, l)
            tiles[layer] = part if layer not in tiles else tiles[layer] + part if differentiable else tiles[layer].add_(part)
        if not out:
            shape = kind.sizes(x.outputs[1], rows.examples, m)
            out = {layer: torch.zeros(shape, dtype=rows.dtype, device=rows.device) for layer in layers}
        for layer, tile in tiles.items():
            out[layer][place] = tile
            if columns is None and x is not y:
                out[layer][kind.place(l, q, k, n)] = kind.mirror(tile)
    return out
