"""Dampings of a sum of matrices that are more than a number: what they add is one more matrix of the sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeom.core.damping import Cutoff, Damping, Relative, Tikhonov, as_damping
from nngeom.core.errors import ArgumentError
from nngeom.core.layout import Layout
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.damped import chosen_numbers, entries_of, relative, require_added, top_cutoff
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.eye import PMatEye
from nngeom.pmat.pmat import PMat
from nngeom.space.pvector import PVector

if TYPE_CHECKING:
    from nngeom.pmat.sums import PMatSum


def added(matrix: PMatSum, damping: Any, limit: int, *, indefinite: bool = False) -> tuple[PMat | None, Damping]:
    """What a ``damping`` adds to a sum as a matrix, if it does, and what is left of it: a number, or a cutoff.

    ``limit``: the longest side of a dense block, for the spectrum that :class:`Cutoff` takes the ``top`` of;
    ``indefinite``: what is solved with may have negative eigenvalues.
    """
    blocks, rest = _shift(matrix, damping, limit)
    if indefinite:
        rest = Tikhonov(require_added(rest, "indefinite=True").value, indefinite=True)
    if not blocks:
        return None, rest
    kind = PMatEye if all(isinstance(b, EyeBlock) for b in blocks.values()) else PMat.makers[Block]
    return kind.of_blocks(matrix.layer_collection, blocks, 0), rest


def _shift(matrix: PMatSum, damping: Any, limit: int) -> tuple[dict[Layout, Block], Damping]:
    lc, nothing = matrix.layer_collection, Tikhonov(0.0)
    if isinstance(damping, PVector):
        return {lc.span(): DiagBlock(entries_of(matrix, damping)[None, None])}, nothing
    if isinstance(damping, Mapping):
        return _by_number(matrix, chosen_numbers(lc, damping)), nothing
    if isinstance(damping, Relative) and damping.factored:
        raise ArgumentError("a sum has no factors of its own for Relative(x, factored=True); expected Relative(x)")
    if isinstance(damping, Relative) and (blocks := matrix.partitioned(limit)) is not None:
        if blocks.rows is not None:  # one block over everything
            mean = EyeBlock(matrix.trace() / lc.numel, *lc.span().sizes)
            return {}, relative(mean, damping, lc.span())
        found = {layout: relative(block, damping, layout).value for layout, block in blocks.blocks.items()}
        return {layout: _eye(matrix, x, layout) for layout, x in found.items()}, nothing
    if isinstance(damping, Cutoff) and damping.top is not None:
        return {}, top_cutoff(matrix.eigh(limit)[0], damping)
    return {}, as_damping(damping)


def _by_number(matrix: PMatSum, chosen: dict[str, float | Tensor]) -> dict[Layout, Block]:
    """A multiple of the identity for all parameters of one number."""
    names: dict[Any, list[str]] = {}
    for name, x in chosen.items():
        names.setdefault(id(x) if isinstance(x, Tensor) else x, []).append(name)
    spans = [(chosen[same[0]], matrix.layer_collection.span(same)) for same in names.values()]
    return {layout: _eye(matrix, x, layout) for x, layout in spans}


def _eye(matrix: PMatSum, x: float | Tensor, layout: Layout) -> EyeBlock:
    return EyeBlock(torch.zeros((), dtype=matrix.dtype, device=matrix.device) + x, *layout.sizes)
