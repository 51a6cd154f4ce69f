"""The Hessian of the mean loss: products by differentiating the gradient, columns of blocks by many products at once.

Double backward, not a backward pass through a forward-mode tangent. In torch 2.13 the latter is silently wrong where
the model has a layer norm or an instance norm (by 38 and 21 % in a small example: the forward formula takes the mean
and deviation it saved for constants), and with plain dual numbers raises for softmax, log_softmax and logsumexp. Nor is
it faster for the columns of a block: the graph of the gradient serves all vectors, so that eight products cost 1.9 to
2.3 forward and backward passes each, those through tangents 2.0 to 3.1 (MLP, LeNet, VGG, transformer on a CPU; one
product alone 2.8 to 3.1 against 2.2 to 3.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.capture.graph import require_differentiable
from nngeom.capture.recorder import record
from nngeom.core.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.cotangents.loss import EmpiricalFisher, Loss, as_loss
from nngeom.measures.projected import projected, structure
from nngeom.measures.second_derivatives import (
    Quadratic,
    SecondDerivatives,
    differentiated,
    require_finite_rows,
    require_symmetric,
)
from nngeom.pmat.block import Block
from nngeom.pmat.dense import DenseBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.representation import Representation, as_representation
from nngeom.pullback.captured_pass import Pass
from nngeom.pullback.proofs import Proof
from nngeom.space.collection import LayerCollection
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Policy, Sweep, require_examples

M = TypeVar("M", bound=ParameterOperator, default=PMatImplicit)


def Hessian(
    model: nn.Module,
    loader: Any,
    representation: type[M] | Representation[M] = PMatImplicit,  # type: ignore[assignment]
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
    """The Hessian of the mean loss, ``1/n sum_i d2 loss_i / dw2``, as PMatImplicit, PMatDense, PMatBlockDiag, PMatDiag,
    PMatQuasiDiag, PMatEye, PMatEKFAC or PMatMixed of these.

    ``loss``: as for :func:`EmpiricalFIM`; the loss of an example is summed over its positions, and averaged over
    examples. The matrix need not be positive: a solve, inverse or sample whose damping is below its most negative
    eigenvalue raises :class:`SingularError`. Entries are exact: double backward, vectorised over columns; Dense and
    Diag take one column a parameter. Attention runs under its math kernel, the one that can be differentiated twice.

    PMatEKFAC has the eigenbasis of the factors of :func:`GGN`, or the one that ``rescaled`` keeps, and in it the
    diagonal of the Hessian, exact, at one product a parameter (George 2023, thesis, lemma A.2.1).

    ``representation``: one of these classes, or a subclass of theirs that keeps their recipe; ``options`` are theirs.
    Raises :class:`UnsupportedError` for other representations; other arguments and errors as for :func:`FIM`. Source:
    Pearlmutter 1994.
    """
    kind: Any = representation.kind if isinstance(representation, Representation) else representation
    chosen = _projecting(representation, options)
    entries = None if chosen else _entries(kind)
    if isinstance(representation, Representation) and not chosen:
        options = {**representation.settings, **options}
    if options and not chosen:
        raise ArgumentError(f"{kind.__name__} of a Hessian has no option {list(options)}")
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
    run.require_alone("Hessian")
    sweep = Sweep(run, EmpiricalFisher(as_loss(loss, model)), Policy("Hessian"))
    with run.within():
        if kind is PMatImplicit:
            sweep = replace(sweep, run=run.held())
            width = max((second.width // second.examples for second in batchwise(sweep)), default=0)
            quiet = replace(sweep, run=replace(sweep.run, check=False, progress=False))
            return cast(M, ImplicitHessian(quiet, width=width))
        collection, span = run.network.collection, run.network.collection.span()
        if chosen:
            chosen, sweep = chosen.within(collection), sweep.held()
            return cast(M, projected(sweep, batchwise(sweep), chosen, structure(sweep, chosen)))
        if entries == "diagonal":
            values, count = diagonal(sweep)
            return kind.of_blocks(collection, {span: DiagBlock(span.gather(values))}, count)
        layers = {collection.span(names): names for names in collection.by_layer().values()}
        groups = {span: collection.names} if entries == "all" else layers
        blocks, count = squares(sweep, groups)
        return kind.of_blocks(collection, blocks, count)


def _projecting(representation: Any, options: dict[str, Any]) -> Representation[Any] | None:
    """The representation, where it keeps something of any matrix in a structure that is measured first."""
    if not isinstance(representation, Representation) and not getattr(representation, "projects", False):
        return None
    chosen = as_representation(representation, **options)
    listed = chosen.kind.entries is not None and not hasattr(chosen, "members")
    return chosen if chosen.projects and not listed else None


def _entries(kind: Any) -> str | None:
    """Which entries of the Hessian a class of matrices keeps, ``None`` for PMatImplicit; raises for all others."""
    if not isinstance(kind, type):
        expected = "PMatImplicit, PMatDense, PMatBlockDiag, PMatDiag, PMatQuasiDiag, PMatEye or PMatEKFAC"
        raise ArgumentTypeError(f"representation is {kind!r}; expected {expected}")
    entries: str | None = getattr(kind, "entries", None)
    if kind is not PMatImplicit and entries is None:
        raise UnsupportedError(
            "the Hessian is offered as PMatImplicit, PMatDense, PMatBlockDiag, PMatDiag, PMatQuasiDiag, PMatEye, "
            f"PMatEKFAC and PMatMixed of these, got {kind.__name__}: it is no average of outer products; use GGN (a "
            "subclass with the recipe of one of these is one of these)"
        )
    return entries


def batchwise(sweep: Sweep, width: int | None = None) -> Iterator[SecondDerivatives]:
    """The second derivatives of every batch. Without the ``width`` of an example, its bytes, every batch is looked at:
    modes that mix examples or draw at random are refused, and the derivatives checked, once for each graph of the
    model.
    """
    run, network, loss = sweep.run, sweep.run.network, sweep.cotangents.loss  # type: ignore[attr-defined]
    known: list[Proof] = []  # of graphs whose second derivatives were checked
    for index, batch in enumerate(run.followed(sweep.policy.label)):
        if width is not None:
            yield differentiated(network, loss, batch, index, width)
            continue
        capture = record(network, batch)
        activations = sum(use.shape.numel() for use in capture.uses) + capture.outputs.numel()
        each = 4 * activations * capture.outputs.element_size() // max(1, capture.outputs.shape[0])
        proof = None
        if run.check:
            separated = Pass(network, capture, set())
            separated.require_separate()
            proof = separated.proof
            del separated
        del capture
        second = differentiated(network, loss, batch, index, each)
        if proof is not None and not any(proof is other for other in known):
            require_differentiable(second.gradients.values())
            require_symmetric(second, partial(differentiated, network, Quadratic(), batch, index, each))
            known.append(proof)
        yield second


def squares(sweep: Sweep, groups: dict[Layout, tuple[str, ...]]) -> tuple[dict[Layout, Block], int]:
    """``{layout: DenseBlock}`` of the parameters of each group, and the number of examples."""
    like = torch.empty(0, dtype=accumulation_dtype(sweep.run.network.dtype), device=sweep.run.network.device)
    sums = {layout: like.new_zeros(layout.numel, layout.numel) for layout in groups}
    count = 0
    for batch in batchwise(sweep):
        for layout, names in groups.items():
            for lo, hi, rows in batch.times(names, _units(layout.numel, like), layout.numel):
                sums[layout][lo:hi] += rows
        count += batch.examples
    require_examples(count)
    return {
        layout: DenseBlock(require_finite_rows((m + m.T) / (2 * count), layout.names)) for layout, m in sums.items()
    }, count


def diagonal(sweep: Sweep, width: int | None = None) -> tuple[Tensor, int]:
    """The diagonal ``(d,)``, a layer at a time, and the number of examples."""
    collection = sweep.run.network.collection
    layers = {collection.span(names): names for names in collection.by_layer().values()}
    total = torch.zeros(
        collection.numel, dtype=accumulation_dtype(sweep.run.network.dtype), device=sweep.run.network.device
    )
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
    return require_finite_rows(total / count, collection.names), count


def _units(p: int, like: Tensor) -> Callable[[int, int], Tensor]:
    """Rows ``lo .. hi - 1`` of the identity."""

    def rows(lo: int, hi: int) -> Tensor:
        out = like.new_zeros(hi - lo, p)
        column = torch.arange(lo, hi, device=out.device)
        out[column - lo, column] = 1
        return out

    return rows


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitHessian(PMatImplicit):
    """The Hessian by its products: one differentiated gradient a batch, pulled back for all vectors at once."""

    width: int = 0  # bytes of the activations of an example, roughly

    def products(self, x: Tensor) -> Tensor:
        total, count = torch.zeros_like(x), 0
        for batch in batchwise(self.sweep, self.width):
            for lo, hi, rows in batch.times(self.layer_collection.names, lambda lo, hi: x[lo:hi], len(x)):
                total[lo:hi] += rows
            count += batch.examples
        return total / count

    def _exact_trace(self) -> Tensor:
        return self._exact_diagonal().sum()

    def _exact_diagonal(self) -> Tensor:
        with self.run.within():
            return self.scale * diagonal(self.sweep, self.width)[0]
