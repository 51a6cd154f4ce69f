"""The mean of two factors that are held by their eigenvalues and eigenvectors, as a factor again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import bases, linalg
from nngeom.core.completed import CompletedBasis
from nngeom.core.linalg import Basis
from nngeom.core.sketch import normal_vectors
from nngeom.pmat.dropped import WHOLE, dropped, signs


@dataclass(frozen=True)
class Side:
    """``F`` in the orthonormal basis ``u``, of these ``values [s, p]``; ``lost``: the share of what it stands for that
    is not kept, its standard error, and the side.
    """

    u: Basis | None
    values: Tensor
    lost: Tensor | None

    def times(self, x: Tensor) -> Tensor:
        """``F x``, ``[s, p, m]``."""
        return linalg.left(self.u, linalg.left(self.values, linalg.left(self.u, x, transpose=True)))

    def diagonal(self) -> Tensor:
        """``[s, p]``."""
        return bases.squares_times(self.u, self.values.unsqueeze(-1)).squeeze(-1)

    def rest(self) -> tuple[Tensor, Tensor]:
        """About the norm of what is not kept, and its standard error: of a share ``r`` of the norm of the whole, which
        what is kept is the root of ``1 - r^2`` of.
        """
        if self.lost is None or bool(self.lost[0] == WHOLE):
            return self.values.new_zeros(()), self.values.new_zeros(())
        share, error = self.lost[0].clamp(0, 0.999), self.lost[1]
        whole = self.values.norm() / (1 - share.square()).sqrt()
        return share * whole, error * whole


def merged_side(x: Side, y: Side, mine: float, theirs: float) -> tuple[Tensor, Tensor] | None:
    """``mine F + theirs G`` of two sides as a dense factor, its diagonal or a sketch, and what is lost: the shares of
    both and what the merged one drops of their mean, added up; ``None`` of sides that are held differently.
    """
    completed = [side.u for side in (x, y) if isinstance(side.u, CompletedBasis)]
    if len(completed) != 2:
        if completed or (x.u is None) is not (y.u is None):
            return None
        spanned = [bases.spanned(side.u, side.values) for side in (x, y)]
        return mine * spanned[0] + theirs * spanned[1], _whole(x)
    p, rank = x.values.shape[1], max(u.rank for u in completed)
    w = torch.cat([signs(p, x.values), normal_vectors(p, rank, x.values)], 1).unsqueeze(0)
    products = mine * x.times(w) + theirs * y.times(w)
    count = products.shape[-1] - rank
    diagonal = mine * x.diagonal() + theirs * y.diagonal()
    sketch = torch.cat([diagonal.unsqueeze(-1), products[..., count:]], -1)
    return sketch, _lost(x, y, mine, theirs, dropped([sketch], products), products[..., :count])


def _whole(x: Side) -> Tensor:
    return x.values.new_full((3,), WHOLE)


def _lost(x: Side, y: Side, mine: float, theirs: float, again: Tensor, products: Tensor) -> Tensor:
    """The share of all that is lost, of the norm of the mean with it, its standard error, and the side."""
    kept = products.square().sum((0, 1)).mean().sqrt()
    (a, error_a), (b, error_b) = x.rest(), y.rest()
    parts = torch.stack([mine * a, theirs * b, again[0] * kept])
    errors = torch.stack([mine * error_a, theirs * error_b, again[1] * kept])
    whole = (kept.square() + parts.sum().square()).sqrt()
    found = torch.stack([parts.sum(), errors.square().sum().sqrt()]) / whole.clamp_min(torch.finfo(whole.dtype).tiny)
    return torch.cat([found, again[2:]])
