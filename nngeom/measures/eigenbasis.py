"""The Hessian in a Kronecker eigenbasis: the diagonal of ``U^T H U``, no eigenbasis of its own (George 2023, A.2.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nngeom.core.errors import StructureError
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.cotangents.loss import GaussNewton
from nngeom.measures.second_derivatives import SecondDerivatives, require_finite_rows
from nngeom.pmat.drive import Repeated, built
from nngeom.pmat.ekfac import Rescaling
from nngeom.pmat.kronecker import EigenBlock
from nngeom.pmat.recipe import Selection
from nngeom.pmat.representation import Representation
from nngeom.pmat.selected import moved
from nngeom.sweep.sweep import Policy, Sweep, require_examples


def bases(sweep: Sweep, chosen: Representation) -> dict[Layout, EigenBlock]:
    """Those that are given, or those of the factors of the Gauss-Newton matrix of the same loss."""
    collection = sweep.run.network.collection
    if not isinstance(chosen, Rescaling):
        curved = replace(
            sweep,
            cotangents=GaussNewton(sweep.cotangents.loss),  # type: ignore[attr-defined]
            policy=Policy("GGN", part_of=chosen.part_of, reread=True),
        )
        chosen = chosen.last_sweep(built(chosen, collection, Repeated(curved, chosen.passes)))
    if not isinstance(chosen, Rescaling):
        raise StructureError(f"{chosen.kind.__name__} keeps no eigenbasis; expected PMatEKFAC")
    return chosen.bases_of(Selection.of(collection))


def spectra(
    sweep: Sweep, batches: Iterator[SecondDerivatives], kept: dict[Layout, EigenBlock]
) -> tuple[dict[Layout, EigenBlock], int]:
    """``u^T H u`` of the mean loss for every vector ``u`` of the ``kept`` bases, and the number of examples."""
    network, count = sweep.run.network, 0
    like = torch.empty(0, dtype=accumulation_dtype(network.dtype), device=network.device)
    wide = {layout: basis.to(like.device, like.dtype) for layout, basis in kept.items()}
    sums = {layout: like.new_zeros(layout.numel) for layout in kept}
    for batch in batches:
        for layout, basis in wide.items():
            part = network.collection.only(layout.names)
            vectors = _vectors(moved(layout, part), basis, like)
            for lo, hi, rows in batch.times(part.names, vectors, layout.numel):
                sums[layout][lo:hi] += (rows * vectors(lo, hi)).sum(1)
        count += batch.examples
    require_examples(count)
    means = {lay: require_finite_rows(total / count, lay.names).view(lay.sizes) for lay, total in sums.items()}
    return {lay: replace(wide[lay], d=d) for lay, d in means.items()}, count


def _vectors(layout: Layout, basis: EigenBlock, like: Tensor) -> Callable[[int, int], Tensor]:
    """The basis vectors ``lo .. hi - 1`` of a block as flat vectors of its parameters, ``[hi - lo, p]``."""

    def rows(lo: int, hi: int) -> Tensor:
        units = like.new_zeros(hi - lo, layout.numel)
        column = torch.arange(lo, hi, device=units.device)
        units[column - lo, column] = 1
        out = torch.empty_like(units)
        layout.scatter_(out, basis.basis.mv(units.view(-1, *layout.sizes)))
        return out

    return rows
