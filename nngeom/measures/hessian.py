"""The Hessian of the mean loss: products by differentiating the gradient, columns of blocks by many products at once.

Double backward, not a backward pass through a forward-mode tangent. In torch 2.13 the latter is silently wrong where
the model has a layer norm or an instance norm (by 38 and 21 % in a small example: the forward formula takes the mean
and deviation it saved for constants), and with plain dual numbers raises for softmax, log_softmax and logsumexp. Nor is
it faster for the columns of a block: the graph of the gradient serves all vectors, so that eight products cost 1.9 to
2.3 forward and backward passes each, those through tangents 2.0 to 3.1 (MLP, LeNet, VGG, transformer on a CPU; one
product alone 2.8 to 3.1 against 2.2 to 3.0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from nngeom.core.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from nngeom.cotangents.loss import EmpiricalFisher, Loss, as_loss
from nngeom.measures.arguments import require_known
from nngeom.measures.hessian_entries import batchwise, diagonal, squares
from nngeom.measures.nearest_hessian import is_kronecker, nearest_hessian, require_nearest
from nngeom.measures.projected import projected, structure
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.implicit import PMatImplicit
from nngeom.pmat.operator import ParameterOperator
from nngeom.pmat.representation import Representation, as_representation
from nngeom.space.collection import LayerCollection
from nngeom.sweep.agreement import agree, first_look
from nngeom.sweep.run import Run
from nngeom.sweep.sweep import Policy, Sweep

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
    PMatQuasiDiag, PMatEye, PMatEKFAC or PMatMixed of these, or PMatKFAC.

    ``loss``: as for :func:`EmpiricalFIM`; the loss of an example is summed over its positions, and averaged over
    examples. The matrix need not be positive: a solve, inverse or sample whose damping is below its most negative
    eigenvalue raises :class:`SingularError`. Entries are exact: double backward, vectorised over columns; Dense and
    Diag take one column a parameter. Attention runs under its math kernel, the one that can be differentiated twice.

    PMatEKFAC has the eigenbasis of the factors of :func:`GGN`, or the one that ``rescaled`` keeps, and in it the
    diagonal of the Hessian, exact, at one product a parameter (George 2023, thesis, lemma A.2.1). PMatKFAC takes
    ``fit="nearest"``: the Kronecker products nearest to the blocks in Frobenius norm, from those of :func:`GGN` on, in
    at most ``fit_steps`` steps of as many products as the rank of one factor times the side of the other.

    ``representation``: one of these classes, or a subclass of theirs that keeps their recipe; ``options`` are theirs.
    Raises :class:`UnsupportedError` for other representations; other arguments and errors as for :func:`FIM`. Source:
    Pearlmutter 1994.
    """
    require_known(Hessian, representation, options)
    kind: Any = representation.kind if isinstance(representation, Representation) else representation
    chosen = _projecting(representation, options)
    entries = None if chosen else _entries(kind)
    if isinstance(representation, Representation) and not chosen:
        options = {**representation.settings, **options}
    if options and not chosen:
        raise ArgumentError(f"{kind.__name__} of a Hessian has no option {list(options)}")
    run = Run.gathering(
        model,
        loader,
        function=function,
        layer_collection=layer_collection,
        progress=progress,
        memory_budget=memory_budget,
        check=check,
        process_group=process_group,
    )
    sweep = Sweep(run, EmpiricalFisher(as_loss(loss, model)), Policy("Hessian"))
    with run.within():
        agree(run, "Hessian", representation=representation, options=options, metric=sweep.cotangents)
        if kind is PMatImplicit:
            return cast(M, implicit(sweep))
        collection, span = run.network.collection, run.network.collection.span()
        if chosen:
            chosen, sweep = chosen.within(collection), sweep.held()
            if is_kronecker(chosen):
                return cast(M, nearest_hessian(sweep, chosen))
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
    if is_kronecker(representation):
        return require_nearest(as_representation(representation, **options))
    if not isinstance(representation, Representation) and not getattr(representation, "projects", False):
        return None
    chosen = as_representation(representation, **options)
    listed = getattr(chosen.kind, "entries", None) is not None and not hasattr(chosen, "members")
    return chosen if chosen.projects and not listed else None


def _entries(kind: Any) -> str | None:
    """Which entries of the Hessian a class of matrices keeps, ``None`` for PMatImplicit; raises for all others."""
    if not isinstance(kind, type):
        expected = "PMatImplicit, PMatDense, PMatBlockDiag, PMatDiag, PMatQuasiDiag, PMatEye, PMatEKFAC or PMatKFAC"
        raise ArgumentTypeError(f"representation is {kind!r}; expected {expected}")
    entries: str | None = getattr(kind, "entries", None)
    if kind is not PMatImplicit and entries is None:
        raise UnsupportedError(
            "the Hessian is offered as PMatImplicit, PMatDense, PMatBlockDiag, PMatDiag, PMatQuasiDiag, PMatEye, "
            "PMatEKFAC and PMatMixed of these, and as PMatKFAC with fit='nearest', got "
            f"{kind.__name__}: it is no average of outer products; use GGN (a "
            "subclass with the recipe of one of these is one of these)"
        )
    return entries


def implicit(sweep: Sweep) -> ImplicitHessian:
    """The Hessian by products, after a look at every batch, checked."""
    width = 0

    def look() -> Sweep:
        nonlocal width
        held = replace(sweep, run=sweep.run.held())
        width = max((second.width // second.examples for second in batchwise(held)), default=0)
        return replace(held, run=replace(held.run, check=False, progress=False))

    return ImplicitHessian(first_look(sweep.run, look), width=width)


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitHessian(PMatImplicit):
    """The Hessian by its products: one differentiated gradient a batch, pulled back for all vectors at once."""

    width: int = 0  # bytes of the activations of an example, roughly

    def products(self, x: Tensor) -> tuple[Tensor, int]:
        total, count = torch.zeros_like(x), 0
        for batch in batchwise(self.sweep, self.width):
            if len(x) == 1:
                batch.add_product_(total[0], x[0])
            else:
                for lo, hi, rows in batch.times(self.layer_collection.names, lambda lo, hi: x[lo:hi], len(x)):
                    total[lo:hi] += rows
            count += batch.examples
        return total, count

    def _exact_trace(self) -> Tensor:
        return self._exact_diagonal().sum()

    def _exact_diagonal(self) -> Tensor:
        with self.run.within():
            return self.scale * diagonal(self.sweep, self.width)[0]
