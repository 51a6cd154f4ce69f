"""The Hessian as it is kept by a structure that its second moment has: entries, units, and eigenbases of factors.

A block of the structure says which numbers of ``H u`` it keeps for each of its vectors ``u``: unit vectors, or the
eigenvectors of its factors, in which the diagonal of ``U^T H U`` is kept (George 2023, thesis, lemma A.2.1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import UnsupportedError
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.cotangents.loss import GaussNewton
from nngeom.measures.second_derivatives import SecondDerivatives, require_finite_rows
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.dense import DenseBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.drive import Repeated, built
from nngeom.pmat.ekfac import Rescaling
from nngeom.pmat.kronecker import EigenBlock
from nngeom.pmat.pmat import PMat
from nngeom.pmat.quasi_diag import ArrowBlock
from nngeom.pmat.recipe import Selection
from nngeom.pmat.representation import Representation
from nngeom.pmat.selected import moved
from nngeom.ranks.totals import totals
from nngeom.space.collection import LayerCollection
from nngeom.sweep.sweep import Policy, Sweep, require_examples


def structure(sweep: Sweep, chosen: Representation[Any]) -> dict[Layout, Block]:
    """The blocks whose places and bases are kept: those given, or those of second moments of the same loss.

    Bases are those of the Gauss-Newton matrix; where there are none, that of the gradients has the same places.
    """
    collection = sweep.run.network.collection
    if isinstance(chosen, Rescaling):
        kept = chosen.bases_of(Selection.of(collection))
        return chosen.kind.of_blocks(collection, dict(kept), 0).blocks
    loss = sweep.cotangents.loss  # type: ignore[attr-defined]
    cotangents = sweep.cotangents if chosen.passes == 1 else GaussNewton(loss)
    policy = Policy("second moment", part_of=chosen.division, reread=True)
    moments = replace(sweep, cotangents=cotangents, policy=policy)
    return built(chosen, collection, Repeated(moments, chosen.passes)).blocks


def projected(
    sweep: Sweep, batches: Iterator[SecondDerivatives], chosen: Representation[Any], blocks: dict[Layout, Block]
) -> PMat:
    """The mean Hessian in the structure of the ``blocks``, one product a parameter."""
    network = sweep.run.network
    like = torch.empty(0, dtype=accumulation_dtype(network.dtype), device=network.device)
    wide = {layout: block.to(like.device, like.dtype) for layout, block in blocks.items()}

    def local() -> tuple[list[Tensor], int]:
        sums, count = dict[Layout, Tensor](), 0
        for batch in batches:
            for layout, block in wide.items():
                total = _kept_of(batch, network.collection.only(layout.names), layout, block, like)
                sums[layout] = total + sums[layout] if layout in sums else total
            count += batch.examples
        return [sums[lay] if lay in sums else _nothing(lay, b, like) for lay, b in wide.items()], count

    found, count = totals(sweep.run.team, "Hessian", local)
    require_examples(count)
    means = {layout: require_finite_rows(t / count, layout.names) for layout, t in zip(wide, found)}
    new = {layout: remade(wide[layout], mean) for layout, mean in means.items()}
    return chosen.kind.of_blocks(network.collection, new, count)


def _kept_of(batch: SecondDerivatives, part: LayerCollection, layout: Layout, block: Block, like: Tensor) -> Tensor:
    """What a block keeps of the second derivatives of a batch in its parameters, the collection ``part``."""
    here, found = moved(layout, part), []
    for lo, hi, rows in batch.times(part.names, _vectors(here, block, like), layout.numel):
        found.append(kept(block, here.gather(rows.to(like.dtype)), torch.arange(lo, hi, device=like.device)))
    return torch.cat(found) if found else _nothing(layout, block, like)


def _nothing(layout: Layout, block: Block, like: Tensor) -> Tensor:
    """What a block keeps of no examples."""
    first = torch.zeros(1, dtype=torch.int64, device=like.device)
    return like.new_zeros(layout.numel, kept(block, like.new_zeros(1, *layout.sizes), first).shape[1])


def _vectors(layout: Layout, block: Block, like: Tensor) -> Callable[[int, int], Tensor]:
    """The vectors ``lo .. hi - 1`` of a block as flat vectors of its parameters, ``[hi - lo, p]``."""

    def rows(lo: int, hi: int) -> Tensor:
        units = like.new_zeros(hi - lo, layout.numel)
        column = torch.arange(lo, hi, device=units.device)
        units[column - lo, column] = 1
        x = units.view(-1, *layout.sizes)
        out = torch.empty_like(units)
        layout.scatter_(out, block.basis.mv(x) if isinstance(block, EigenBlock) else x)
        return out

    return rows


@functools.singledispatch
def kept(block: Block, rows: Tensor, vectors: Tensor) -> Tensor:
    """``[k, m]``: what a block keeps of the products ``rows [k, s, o, i]`` with its ``vectors [k]``, by their place."""
    raise UnsupportedError(
        f"a {type(block).__name__} keeps nothing of a Hessian, which is no average of outer products; use PMatEKFAC, "
        "PMatDense, PMatBlockDiag, PMatQuasiDiag, PMatDiag, PMatEye or GGN"
    )


@kept.register
def _(block: DenseBlock, rows: Tensor, vectors: Tensor) -> Tensor:
    return rows.flatten(1)


@kept.register(DiagBlock)
@kept.register(EyeBlock)
def _(block: Block, rows: Tensor, vectors: Tensor) -> Tensor:
    return rows.flatten(1).gather(1, vectors[:, None])


@kept.register
def _(block: EigenBlock, rows: Tensor, vectors: Tensor) -> Tensor:
    return block.basis.tmv(rows).flatten(1).gather(1, vectors[:, None])


@kept.register
def _(block: ArrowBlock, rows: Tensor, vectors: Tensor) -> Tensor:
    """The diagonal, and the entry at the bias of the same unit."""
    i = rows.shape[-1]
    return rows.flatten(1).gather(1, torch.stack([vectors, vectors // i * i + i - 1], 1))


@functools.singledispatch
def remade(block: Block, mean: Tensor) -> Block:
    """The block of the mean of what it :func:`kept`, ``[p, m]``."""
    raise UnsupportedError(f"a {type(block).__name__} keeps nothing of a Hessian")


@remade.register
def _(block: DenseBlock, mean: Tensor) -> Block:
    return DenseBlock((mean + mean.T) / 2)


@remade.register
def _(block: DiagBlock, mean: Tensor) -> Block:
    return DiagBlock(mean.view(block.sizes))


@remade.register
def _(block: EyeBlock, mean: Tensor) -> Block:
    return replace(block, c=mean.mean())


@remade.register
def _(block: EigenBlock, mean: Tensor) -> Block:
    return replace(block, d=mean.view(block.sizes))


@remade.register
def _(block: ArrowBlock, mean: Tensor) -> Block:
    diagonal, coupling = mean.view(*block.sizes, 2).unbind(-1)
    return ArrowBlock(diagonal.contiguous(), coupling[..., :-1].contiguous())
