"""The Kronecker products nearest to the blocks of a Hessian in Frobenius norm: no block is ever formed.

The power iterations of :mod:`nngeom.pmat.nearest` on a block ``H`` that is no mean of outer products ::

    A[i, j] = sum_op G[o, p] H[(o, i), (p, j)] / |G|**2        G[o, p] = sum_ij A[i, j] H[(o, i), (p, j)] / |A|**2

With ``G = sum_r y_r u_r u_r^T``, row ``i`` of the first is a sum of ``y_r u_r^T H (u_r x e_i)``: a product for each
eigenvector and each input. They begin at the factors of the Gauss-Newton matrix; factors may have negative eigenvalues.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.errors import UnsupportedError
from nngeom.core.layout import Layout
from nngeom.core.linalg import accumulation_dtype
from nngeom.cotangents.loss import GaussNewton
from nngeom.measures.hessian_entries import batchwise
from nngeom.measures.second_derivatives import SecondDerivatives, require_finite_rows
from nngeom.pmat.drive import Repeated, built
from nngeom.pmat.kfac import PMatKFAC
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.long_factors import FORMS
from nngeom.pmat.nearest import Fit, require_fit, warn_of_open
from nngeom.pmat.pmat import PMat
from nngeom.pmat.representation import Representation
from nngeom.pmat.selected import moved
from nngeom.ranks.totals import totals
from nngeom.space.collection import LayerCollection
from nngeom.sweep.sweep import Policy, Sweep, require_examples


def is_kronecker(representation: Any) -> bool:
    """Whether a representation is of Kronecker products alone."""
    kind = representation.kind if isinstance(representation, Representation) else representation
    return isinstance(kind, type) and issubclass(kind, PMatKFAC)


def require_nearest(chosen: Representation[Any]) -> Representation[Any]:
    """The same; raises :class:`UnsupportedError` unless it is to be the nearest Kronecker product, and what its recipe
    does of options that do not go with that.
    """
    if chosen.settings.get("fit") != "nearest":
        raise UnsupportedError(
            f"a Hessian is no average of outer products, whose factors {chosen.kind.__name__} would be of; pass "
            "fit='nearest' for the Kronecker products nearest to its blocks, or use PMatEKFAC, or GGN"
        )
    told = chosen.settings
    whole = not told.get("sua") and told.get("factor_form", FORMS[0]) == FORMS[0]
    require_fit("nearest", told.get("fit_steps", 50), sua=not whole)
    return chosen


def nearest_hessian(sweep: Sweep, chosen: Representation[Any]) -> PMat:
    """The mean Hessian of a ``sweep`` that holds its batches, as ``chosen``, a :class:`PMatKFAC` of this fit."""
    collection, steps = sweep.run.network.collection, chosen.settings.get("fit_steps", 50)
    policy = Policy("second moment", part_of=chosen.division, reread=True)
    moments = replace(sweep, cotangents=GaussNewton(sweep.cotangents.loss), policy=policy)  # type: ignore[attr-defined]
    first: Representation[Any] = Representation(chosen.kind, {**chosen.settings, "fit": "moments"})
    start = built(first, collection, Repeated(moments, 1))
    wide = accumulation_dtype(sweep.run.network.dtype)
    fits = {
        layout: Fit(KroneckerBlock(block.a.to(wide), block.g.to(wide)))
        for layout, block in start.blocks.items()
        if isinstance(block, KroneckerBlock)
    }
    width = None
    for step in range(steps):
        open_ = {layout: fit.block for layout, fit in fits.items() if not fit.done}
        if not open_:
            break
        found, width = _step(sweep, open_, width, inputs=step % 2 == 0)
        for layout, mean in found.items():
            fits[layout].update(mean, inputs=step % 2 == 0)
    warn_of_open(fits, steps)
    blocks = {**start.blocks, **{layout: fit.block for layout, fit in fits.items()}}
    return chosen.kind.of_blocks(collection, blocks, start.examples)


def _step(
    sweep: Sweep, blocks: dict[Layout, KroneckerBlock], width: int | None, *, inputs: bool
) -> tuple[dict[Layout, Tensor], int]:
    """The mean of what the next factor of every block is made of, and the bytes of an example's activations, which are
    looked for with the checks where no ``width`` is given.
    """
    sides = {layout: _Side(block, inputs=inputs) for layout, block in blocks.items()}
    widths = [width or 0]

    def local() -> tuple[list[Tensor], int]:
        sums, count = {layout: side.zero() for layout, side in sides.items()}, 0
        for batch in batchwise(sweep, width):
            for layout, side in sides.items():
                side.add(sums[layout], batch, sweep.run.network.collection.only(layout.names), layout)
            count += batch.examples
            widths.append(batch.width // batch.examples)
        return list(sums.values()), count

    found, count = totals(sweep.run.team, "Hessian", local)
    require_examples(count)
    means = {
        layout: require_finite_rows((t + t.mT) / (2 * count) if t.ndim == 3 else t / count, layout.names)
        for layout, t in zip(sides, found)
    }
    return means, max(widths)


class _Side:
    """One side of a block: the sums over products with the eigenvectors of the other."""

    def __init__(self, block: KroneckerBlock, *, inputs: bool) -> None:
        mine, other = (block.a, block.g) if inputs else (block.g, block.a)
        self.sizes, self.inputs, self.mine = block.sizes, inputs, mine
        self.values, u = linalg.factor_eigh(other)
        self.u = u if isinstance(u, Tensor) else torch.diag_embed(torch.ones_like(self.values))  # [s m m]
        used = self.values.abs().amax(0).nonzero().flatten()
        units = torch.arange(mine.shape[1], device=mine.device)
        self.group, self.vector, self.unit = (
            t.flatten() for t in torch.meshgrid(torch.arange(len(mine), device=mine.device), used, units, indexing="ij")
        )

    def zero(self) -> Tensor:
        """The sum over no examples, of the shape of the factor."""
        return torch.zeros_like(self.mine)

    def add(self, total: Tensor, batch: SecondDerivatives, part: LayerCollection, layout: Layout) -> None:
        """Add the products of a batch, with the parameters ``part`` of a ``layout``."""
        here = moved(layout, part)

        def columns(lo: int, hi: int) -> Tensor:
            s, q, unit = self.group[lo:hi], self.vector[lo:hi], self.unit[lo:hi]
            x = self.mine.new_zeros(hi - lo, *self.sizes)
            along = x if self.inputs else x.mT
            along[torch.arange(hi - lo, device=x.device), s, :, unit] = self.u[s, :, q]
            out = self.mine.new_empty(hi - lo, layout.numel)
            here.scatter_(out, x)
            return out

        for lo, hi, rows in batch.times(part.names, columns, len(self.unit)):
            s, q, unit = self.group[lo:hi], self.vector[lo:hi], self.unit[lo:hi]
            x = here.gather(rows.to(total.dtype))
            along = x if self.inputs else x.mT
            own = along[torch.arange(hi - lo, device=x.device), s]  # [k m p]
            sums = self.values[s, q].unsqueeze(-1) * (self.u[s, :, q].unsqueeze(1) @ own).squeeze(1)
            if linalg.is_diagonal(total):
                total.index_put_((s, unit), sums.gather(1, unit[:, None]).squeeze(1), accumulate=True)
            else:
                total.index_put_((s, unit), sums, accumulate=True)
