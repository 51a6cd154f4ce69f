"""The Hessian of the mean loss: products by differentiating the gradient, columns of blocks by many products at once.

Double backward, not a backward pass through a forward-mode tangent. In torch 2.13 the latter is silently wrong where the model
has a layer norm or an instance norm (by 38 and 21 % in a small example: the forward formula takes the mean and deviation it
saved for constants), and with plain dual numbers raises for softmax, log_softmax and logsumexp. Nor is it faster for the
columns of a block: the graph of the gradient serves all vectors, so that eight products cost 1.9 to 2.3 forward and backward
passes each, those through tangents 2.0 to 3.1 (MLP, LeNet, VGG, transformer on a CPU; one product alone 2.8 to 3.1 against 2.2 to 3.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nngeom.core import memory
from nngeom.core.errors import ArgumentError, ArgumentTypeError, CoverageError, NonFiniteError, UnsupportedError
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype, flat_rows
from nngeom.generator.backward import pull_back
from nngeom.generator.capture import capture
from nngeom.generator.kernels import twice_differentiable
from nngeom.generator.remedies import gradients
from nngeom.generator.sweep import Sweep, require_examples
from nngeom.generator.task import Batch, Task, gradients_on, require_finite, require_targets
from nngeom.metrics.loss import EmpiricalFisher, Loss, as_loss
from nngeom.pmat.block import Block
from nngeom.pmat.dense import DenseBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.pmat import Representation
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector


def Hessian(
    model: nn.Module,
    loader: Any,
    representation: Any = PMatImplicit,
    *,
    loss: str | Loss | Callable[[Tensor, Any], Tensor],
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    progress: bool = False,
    memory_budget: int | None = None,
    check: bool = True,
    process_group: Any = None,
    **options: Any,
) -> Any:
    """The Hessian of the mean loss, ``1/n sum_i d2 loss_i / dw2``, as PMatImplicit, PMatDense, PMatBlockDiag or PMatDiag.

    Losses as in :func:`EmpiricalFIM`; the loss of an example is summed over its positions, and averaged over examples.
    The matrix need not be positive: a solve, inverse or sample whose damping is below its most negative eigenvalue
    raises :class:`SingularError`. Entries are exact: double backward, vectorised over columns; Dense and Diag take one
    column a parameter. Attention runs under its math kernel, the one that can be differentiated twice.

    Raises :class:`UnsupportedError` for other representations, else as :func:`FIM`. Source: Pearlmutter 1994.
    """
    if process_group is not None:
        raise UnsupportedError("process_group is not available for the Hessian; pass process_group=None and merge shards afterwards")
    kind: Any = representation.kind if isinstance(representation, Representation) else representation
    entries = _entries(kind)
    if isinstance(representation, Representation):
        options = {**representation.settings, **options}
    if options:
        raise ArgumentError(f"{kind.__name__} of a Hessian has no option {list(options)}")
    task = Task.build(model, function, layer_collection)
    with memory.limit(memory_budget):
        batches = list(task.batches(loader)) if kind is PMatImplicit else loader
        sweep = Sweep(task, batches, EmpiricalFisher(as_loss(loss)), memory_budget, check, progress, label="Hessian")
        if kind is PMatImplicit:
            first = next(batchwise(sweep))
            return ImplicitHessian(replace(sweep, check=False, progress=False), width=first.width // first.examples)
        collection, span = task.collection, task.collection.span()
        if entries == "diagonal":
            values, count = diagonal(sweep)
            return kind._make(collection, {span: DiagBlock(span.gather(values))}, count)
        layers = {collection.span(names): names for names in collection.by_layer().values()}
        groups = {span: collection.names} if entries == "all" else layers
        blocks, count = squares(sweep, groups)
        return kind._make(collection, blocks, count)


def _entries(kind: Any) -> str | None:
    """Which entries of the Hessian a class of matrices keeps, ``None`` for PMatImplicit; raises for all others."""
    if not isinstance(kind, type):
        expected = "PMatImplicit, PMatDense, PMatBlockDiag or PMatDiag"
        raise ArgumentTypeError(f"representation is {kind!r}; expected {expected}")
    entries: str | None = getattr(kind, "entries", None)
    if kind is not PMatImplicit and entries is None:
        raise UnsupportedError(
            f"the Hessian is offered as PMatImplicit, PMatDense, PMatBlockDiag and PMatDiag, got {kind.__name__}: it "
            "is no average of outer products; use GGN (a subclass with the recipe of one of these is one of these)"
        )
    return entries


@dataclass(frozen=True, eq=False)
class SecondDerivatives:
    """The summed loss of one batch, differentiated once, with the graph to differentiate it again."""

    task: Task
    gradients: dict[str, Tensor | None]
    examples: int
    width: int  # bytes of the activations, roughly

    def times(self, names: tuple[str, ...], columns: Callable[[int, int], Tensor], count: int) -> Iterator[tuple[int, int, Tensor]]:
        """``(lo, hi, [hi - lo, p])``: the block of ``names`` times the vectors ``columns(lo, hi)``, as many as fit the budget."""
        parameters = [self.task.parameters[n] for n in names]
        used = [p.new_zeros(p.shape) if g is None else g for g, p in ((self.gradients[n], p) for n, p in zip(names, parameters))]
        with gradients_on():  # under no_grad they would be joined without their graph, and every product be zero
            flat = torch.cat([g.flatten() for g in used])
        each = 4 * (flat.numel() * flat.element_size() + self.width)
        for lo, hi in memory.pieces(count, each, "column of the Hessian"):
            v = columns(lo, hi).to(flat.dtype)
            if not flat.requires_grad:
                yield lo, hi, torch.zeros_like(v)
                continue
            try:
                with twice_differentiable(self.task.model):
                    pulled = pull_back(flat, parameters, [p.shape for p in parameters], v, retain=True)
            except RuntimeError as error:
                if "not implemented" not in str(error) and "ouble backward" not in str(error):
                    raise
                raise once_only(str(error)) from error
            yield lo, hi, torch.cat([flat_rows(x.detach()) for x in pulled], 1)


def batchwise(sweep: Sweep, width: int | None = None) -> Iterator[SecondDerivatives]:
    """The second derivatives of every batch. Without the ``width`` of an example, its bytes, the first batch is looked at:
    modes that mix examples or draw at random are refused, and the derivatives checked."""
    task, loss = sweep.task, sweep.metric.loss  # type: ignore[attr-defined]
    looked = width is not None
    for index, batch in enumerate(tqdm(task.batches(sweep.loader), desc=sweep.label, disable=not sweep.progress)):
        if width is None:
            seen = capture(task, batch)
            activations = sum(use.shape.numel() for use in seen.uses) + seen.outputs.numel()
            width = 4 * activations * seen.outputs.element_size() // max(1, seen.outputs.shape[0])
            del seen
        second = _differentiated(task, loss, batch, index, width)
        if index == 0 and sweep.check and not looked:
            _require_connected(second)
            _require_symmetric(second)
        yield second


def once_only(what: str) -> UnsupportedError:
    """The error of a model with an operation that can be differentiated only once."""
    return UnsupportedError(f"the model or the loss has an operation without second derivative ({what}); use GGN, or another operation")


def _require_connected(second: SecondDerivatives) -> None:
    """Raise for functions marked ``once_differentiable``: autograd would take their gradient for a constant."""
    seen: set[Any] = set()
    waiting = [g.grad_fn for g in second.gradients.values() if g is not None and g.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name().endswith("::Error"):
            raise once_only("a torch.autograd.Function marked once_differentiable")
        waiting.extend(n for n, _ in node.next_functions if n is not None)


def _require_symmetric(second: SecondDerivatives) -> None:
    """Raise where ``<u, H v>`` and ``<v, H u>`` differ: some operation of the model has a wrong second derivative."""
    task = second.task
    w = torch.randn(2, task.collection.numel, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(task.device)
    rows = torch.cat([rows for _, _, rows in second.times(task.collection.names, lambda lo, hi: w[lo:hi], 2)])
    rows = _finite(rows, task.collection.names).to(w.dtype)
    scale = rows.norm(dim=1).max()
    tolerance = max(torch.finfo(p.dtype).eps for p in task.parameters.values()) ** 0.5 * scale
    if not bool((rows[0] @ w[1] - rows[1] @ w[0]).abs() <= 100 * tolerance):  # room for TF32 convolutions
        raise CoverageError(
            f"the second derivatives of the model are not symmetric (<u, H v> = {float(rows[0] @ w[1]):.6e}, <v, H u> = {float(rows[1] @ w[0]):.6e}): an "
            "operation, perhaps a custom torch.autograd.Function, is not differentiated rightly when differentiated twice"
        )


def _differentiated(task: Task, loss: Loss, batch: Batch, index: int, width: int) -> SecondDerivatives:
    with gradients_on(), twice_differentiable(task.model):
        outputs = task.run(batch)
        require_finite(outputs.detach(), "outputs", index)
        value = loss(outputs, require_targets(batch)).sum()
        if not value.requires_grad:
            raise CoverageError("the loss does not depend on any selected parameter by differentiable operations (torch.no_grad or .detach() inside?)")
        pulled = gradients(value, list(task.parameters.values()), None, create_graph=True)
    n = outputs.shape[0]
    return SecondDerivatives(task, dict(zip(task.parameters, pulled)), n, n * width)


def squares(sweep: Sweep, groups: dict[Layout, tuple[str, ...]]) -> tuple[dict[Layout, Block], int]:
    """``{layout: DenseBlock}`` of the parameters of each group, and the number of examples."""
    like = torch.empty(0, dtype=accumulation_dtype(sweep.task.dtype), device=sweep.task.device)
    sums = {layout: like.new_zeros(layout.numel, layout.numel) for layout in groups}
    count = 0
    for batch in batchwise(sweep):
        for layout, names in groups.items():
            for lo, hi, rows in batch.times(names, _units(layout.numel, like), layout.numel):
                sums[layout][lo:hi] += rows
        count += batch.examples
    require_examples(count)
    return {layout: DenseBlock(_finite((m + m.T) / (2 * count), layout.names)) for layout, m in sums.items()}, count


def diagonal(sweep: Sweep, width: int | None = None) -> tuple[Tensor, int]:
    """The diagonal ``(d,)``, a layer at a time, and the number of examples."""
    collection = sweep.task.collection
    layers = {collection.span(names): names for names in collection.by_layer().values()}
    total = torch.zeros(collection.numel, dtype=accumulation_dtype(sweep.task.dtype), device=sweep.task.device)
    count = 0
    for batch in batchwise(sweep, width):
        for layout, names in layers.items():
            part = total.new_empty(layout.numel)
            for lo, hi, rows in batch.times(names, _units(layout.numel, total), layout.numel):
                part[lo:hi] = rows[:, lo:hi].diagonal()
            held = layout.gather(total).flatten()
            layout.scatter_(total, (held + part).view(layout.sizes))
        count += batch.examples
    require_examples(count)
    return _finite(total / count, collection.names), count


def _units(p: int, like: Tensor) -> Callable[[int, int], Tensor]:
    """Rows ``lo .. hi - 1`` of the identity."""

    def rows(lo: int, hi: int) -> Tensor:
        out = like.new_zeros(hi - lo, p)
        column = torch.arange(lo, hi, device=out.device)
        out[column - lo, column] = 1
        return out

    return rows


def _finite(m: Tensor, names: tuple[str, ...]) -> Tensor:
    if not bool(torch.isfinite(m).all()):
        raise NonFiniteError(f"second derivatives of parameters {list(names)[:4]} contain NaN or infinity; check the inputs, or use model.double()")
    return m


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitHessian(PMatImplicit):
    """The Hessian by its products: one differentiated gradient a batch, pulled back for all vectors at once."""

    width: int = 0  # bytes of the activations of an example, roughly

    def _unscaled(self, x):
        flat = x.reshape(-1, x.shape[-1])
        total, count = torch.zeros_like(flat), 0
        with memory.limit(self.sweep.memory_budget):
            for batch in batchwise(self.sweep, self.width):
                for lo, hi, rows in batch.times(self.collection.names, lambda lo, hi: flat[lo:hi], len(flat)):
                    total[lo:hi] += rows
                count += batch.examples
        return (total / count).reshape(x.shape)

    def _exact_trace(self):
        return self.diag().flat().sum()

    def diag(self):
        with memory.limit(self.sweep.memory_budget):
            return PVector(self.collection, self.scale * diagonal(self.sweep, self.width)[0])
