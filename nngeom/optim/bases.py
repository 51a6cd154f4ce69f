"""Eigenbases of Kronecker factors: anew, or by one step of orthogonal iteration from the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.damping import Damping, Relative
from nngeom.core.layout import Layout
from nngeom.core.linalg import Basis
from nngeom.core.low_rank_eigh import ROUNDINGS
from nngeom.optim.heads import Head, Leading, iterated
from nngeom.pmat.eigenbases import cost
from nngeom.pmat.kfac import kronecker_blocks
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.ranks.made import made
from nngeom.ranks.team import ALONE, Team

SMALL = 64  # sides up to which an eigendecomposition takes no longer than products and orthogonalisation
Kept = EigenBlock | Head


@dataclass(frozen=True)
class Bases:
    """How eigenbases come about.

    Args:
        refresh: ``"eigh"``, or ``"qr"``: factors with a side above :data:`SMALL` take one step of orthogonal iteration
            from the last basis, where there is one (Vyas et al. 2024, Algorithm 4).
        drowned: of what damping adds to a factor, up to which eigenvalues count as their mean; 0: none does.
        team: the processes that each make some of them.
    """

    refresh: str
    drowned: float
    team: Team = ALONE

    def of(
        self, means: dict[Layout, dict[str, Tensor]], damping: Damping | Relative, last: Mapping[Layout, Kept]
    ) -> dict[Layout, Kept]:
        """Those of the factors, ``means`` of their statistic, with the spectrum of their product."""
        blocks = kronecker_blocks(means)
        costs = {layout: cost(block.a) + cost(block.g) for layout, block in blocks.items()}
        device = next(iter(blocks.values())).a.device
        made_of = lambda layout: self._made(blocks[layout], damping, last.get(layout))
        return made(self.team, "eigenbases", costs, made_of, device)

    def _made(self, block: KroneckerBlock, damping: Damping | Relative, old: Kept | None) -> Kept:
        old = old if self.refresh == "qr" else None
        if self.drowned:
            how = Leading(self.drowned, SMALL, self.refresh == "eigh")
            leading = how.of(block, damping, old if isinstance(old, Head) else None)
            if leading is not None:
                return leading
        whole = old if isinstance(old, EigenBlock) else None
        sa, ua = _eigen(block.a, None if whole is None else whole.ua)
        sg, ug = _eigen(block.g, None if whole is None else whole.ug)
        return EigenBlock(ua, ug, sg.unsqueeze(-1) * sa.unsqueeze(-2), sa, sg)


def _eigen(factor: Tensor, u: Basis | None) -> tuple[Tensor, Basis | None]:
    if linalg.is_diagonal(factor) or not isinstance(u, Tensor) or factor.shape != u.shape or factor.shape[-1] <= SMALL:
        return linalg.factor_eigh(factor)
    values, u = iterated(factor, u)
    floor = ROUNDINGS * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    return torch.where(values > floor, values, torch.zeros_like(values)), u.contiguous()


def moved(x: Tensor, old: Kept, new: Kept, *, squared: bool) -> Tensor:
    """Coordinates ``x [s, o, i]`` of the ``old`` basis in the ``new`` one; ``squared``: of mean squares of coordinates,
    taken to be uncorrelated.
    """
    for side, (mine, theirs) in enumerate(((old.ug, new.ug), (old.ua, new.ua))):
        if not (isinstance(mine, Tensor) and isinstance(theirs, Tensor)):
            continue
        turn = theirs.mT @ mine
        turn = turn.square() if squared else turn
        x = x @ turn.mT if side else turn @ x
    return x
