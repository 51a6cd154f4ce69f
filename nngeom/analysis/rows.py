"""The rows a quantity is read from: LayerJacobians of a probe set, kept in their factored form where that is smaller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core import memory
from nngeom.core.errors import LoaderError
from nngeom.core.jacobian import FactoredJacobian, FullJacobian, LayerJacobian
from nngeom.generator.sweep import Chunk, Metric, Sweep
from nngeom.generator.task import Batch, Task, targets
from nngeom.pmat.recipe import join_rows
from nngeom.space.collection import LayerCollection

Function = Callable[..., Tensor] | None


@dataclass(frozen=True)
class Probe:
    """A model and the batches it is examined on, held so that labels and rows belong to the same examples."""

    task: Task
    batches: list[Batch]

    @staticmethod
    def build(model: nn.Module, loader: Any, function: Function = None, layer_collection: LayerCollection | None = None) -> Probe:
        """Read the loader once; raises :class:`LoaderError` when it is empty."""
        task = Task.build(model, function, layer_collection)
        return Probe(task, list(task.batches(loader)))

    def sweep(self, metric: Metric, check: bool = True, memory_budget: int | None = None) -> Sweep:
        """A sweep over the held batches, each layer by itself."""
        return Sweep(self.task, self.batches, metric, memory_budget, check, part_of=self.task.layer_of)

    def targets(self) -> Tensor | None:
        """The targets of all batches, concatenated; ``None`` where batches have none."""
        parts = [targets(b) for b in self.batches]
        if not all(isinstance(y, Tensor) for y in parts):
            return None
        return torch.cat([y.detach() for y in parts])


def require_labels(probe: Probe) -> Tensor:
    """The targets of a probe; raises :class:`LoaderError` where batches have none."""
    y = probe.targets()
    if y is None:
        raise LoaderError("this quantity needs labels but a batch has none; expected batches (inputs, targets) or dicts with 'labels'")
    return y


def compact(chunk: Chunk) -> Chunk:
    """Each LayerJacobian as it is, or as explicit rows where these take less room (many positions, few parameters)."""
    return replace(chunk, jacobians={layout: _compact(j) for layout, j in chunk.jacobians.items()})


def _compact(j: LayerJacobian) -> LayerJacobian:
    if not isinstance(j, FactoredJacobian):
        return j
    k, n, s, o, i = j.shape
    return FullJacobian(j.matrix()) if k * n * s * o * i < j.a.numel() + j.g.numel() else j


def chunk_gram(x: Chunk, y: Chunk, collection: LayerCollection, names: tuple[str, ...] | None = None) -> Tensor:
    """``[k, n, l, m]``: inner products of the rows of two chunks over ``names`` (all parameters by default).

    Block by block, without forming rows where that is cheaper.
    """
    mine = set(collection.names if names is None else names)
    shared = [layout for layout in x.jacobians if layout in y.jacobians and mine.issuperset(layout.names)]
    total: Tensor | None = None
    for layout in shared:
        block = x.jacobians[layout].gram(y.jacobians[layout])
        total = block if total is None else total + block
    done = {name for layout in shared for name in layout.names}
    rest = tuple(n for n in collection.names if n in mine and n not in done and _has(x, n) and _has(y, n))
    if rest:  # parameters that one batch treats by structure and the other by explicit rows
        span = collection.span(rest)
        rows = [torch.cat(list(join_rows(c, span, rest)), 1) for c in (x, y)]
        block = torch.einsum("knp,lmp->knlm", rows[0], rows[1])
        total = block if total is None else total + block
    if total is None:
        (k, n), (l, m) = (next(iter(c.jacobians.values())).shape[:2] for c in (x, y))
        return next(iter(x.jacobians.values())).matrix().new_zeros(k, n, l, m)
    return total


def _has(chunk: Chunk, name: str) -> bool:
    return any(name in layout.names for layout in chunk.jacobians)


def kernel_of(chunks: list[Chunk], collection: LayerCollection, names: tuple[str, ...] | None = None) -> Tensor:
    """``(c, n, c, n)``: the kernel of the rows of held chunks over ``names`` (all parameters by default)."""
    c, n = chunks[0].outputs[1], sum(x.examples for x in chunks if x.first)
    some = next(iter(chunks[0].jacobians.values()))
    out = torch.zeros(c, n, c, n, dtype=some.dtype, device=some.device)
    for index, x in enumerate(chunks):
        for y in chunks[: index + 1]:
            block = chunk_gram(x, y, collection, names)
            k, m, l, o = block.shape
            rows, columns = (slice(z.outputs[0], z.outputs[0] + w) for z, w in ((x, k), (y, l)))
            out[rows, x.start : x.start + m, columns, y.start : y.start + o] = block
            out[columns, y.start : y.start + o, rows, x.start : x.start + m] = block.permute(2, 3, 0, 1)
    return out


def gradient_gram(x: list[Chunk], y: list[Chunk] | None, collection: LayerCollection) -> Tensor:
    """``(n, m)``: inner products of single rows (one cotangent) of all examples; ``y=None``: with themselves, half the work."""
    rows: list[list[Tensor]] = []
    for i, a in enumerate(x):
        line = []
        for j, b in enumerate(x if y is None else y):
            line.append(rows[j][i].T if y is None and j < i else chunk_gram(a, b, collection)[0, :, 0])
        rows.append(line)
    return torch.cat([torch.cat(line, 1) for line in rows], 0)


@torch.no_grad()
def squared_norms(probe: Probe, metric: Metric, check: bool = True, memory_budget: int | None = None) -> Tensor:
    """``(n,)``: squared norms of the rows, summed over cotangents; rows are not formed where a factored form is cheaper."""
    parts: dict[int, Tensor] = {}
    with memory.limit(memory_budget):
        for chunk in probe.sweep(metric, check, memory_budget).chunks():
            each = torch.stack([j.squared_norms().sum(0) for j in chunk.jacobians.values()]).sum(0)
            parts[chunk.start] = each if chunk.first else parts[chunk.start] + each
    return torch.cat([parts[start] for start in sorted(parts)])
