"""Eigenbases of Kronecker factors: anew, or by one step of orthogonal iteration from the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.damping import Damping, FactoredTikhonov, Relative
from nngeom.core.layout import Layout
from nngeom.core.linalg import Basis
from nngeom.core.low_rank_eigh import ROUNDINGS
from nngeom.optim.heads import Head, Leading, iterated, turned
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
        values: whether eigenvalues are needed under every damping: else, where it is a number, those along the last
            basis do.
    """

    refresh: str
    drowned: float
    team: Team = ALONE
    values: bool = True

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
        values = self.values or isinstance(damping, (FactoredTikhonov, Relative))
        sa, ua = _eigen(block.a, None if whole is None else whole.ua, values=values)
        sg, ug = _eigen(block.g, None if whole is None else whole.ug, values=values)
        return EigenBlock(ua, ug, sg.unsqueeze(-1) * sa.unsqueeze(-2), sa, sg)


def _eigen(factor: Tensor, u: Basis | None, *, values: bool) -> tuple[Tensor, Basis | None]:
    if linalg.is_diagonal(factor) or not isinstance(u, Tensor) or factor.shape != u.shape or factor.shape[-1] <= SMALL:
        return linalg.factor_eigh(factor)
    u, found = iterated(factor, u) if values else turned(factor, u)
    floor = ROUNDINGS * torch.finfo(found.dtype).eps * found.abs().amax(-1, keepdim=True)
    return torch.where(found > floor, found, torch.zeros_like(found)), u.contiguous()


def turns(old: Kept, new: Kept) -> tuple[Tensor | None, Tensor | None]:
    """From ``old`` bases to ``new`` ones, on the sides of outputs and of inputs; ``None`` where none turns."""
    found = []
    for mine, theirs in ((old.ug, new.ug), (old.ua, new.ua)):
        found.append(theirs.mT @ mine if isinstance(mine, Tensor) and isinstance(theirs, Tensor) else None)
    return found[0], found[1]


def moved(x: Tensor, turns: tuple[Tensor | None, Tensor | None], *, squared: bool) -> Tensor:
    """Coordinates ``x [s, o, i]`` in new bases, to which the ``turns`` lead; ``squared``: of mean squares of
    coordinates, taken to be uncorrelated.
    """
    on_g, on_a = (turn if turn is None or not squared else turn.square() for turn in turns)
    x = x if on_g is None else on_g @ x
    return x if on_a is None else x @ on_a.mT
