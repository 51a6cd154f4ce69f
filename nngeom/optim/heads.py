"""The leading part of a Kronecker-factored eigenbasis: eigenvectors that the damping drowns are not needed one by one.

Damped factor by factor, ``(A + r_A) (x) (G + r_G)``, directions of ``A`` whose eigenvalues are small against ``r_A``
are all divided alike. They count as one eigenvalue, their mean ``t_A``, and so on the side of ``G``: outside of the
leading eigenvectors ``U_A [i, p]``, ``U_G [o, q]`` the preconditioner is that of KFAC, and a product of projections;
inside it has any spectrum. With ``b = 1 / ((s_A + r_A) (t_G + r_G))``, ``c = 1 / ((t_A + r_A) (s_G + r_G))``, and ``z``
of both tails,

    z V + U_G [(c - z) U_G^T V + E U_A^T] + [(b - z) V U_A] U_A^T,  E = w - (b + c - z) U_G^T V U_A

for a gradient ``V`` that is ``w`` inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.damping import Damping, FactoredTikhonov, Relative
from nngeom.pmat.block import Block, TensorObject
from nngeom.pmat.kronecker import KroneckerBlock

Rows = tuple[Tensor, Tensor] | None  # ``D [r, o]``, ``A [r, i]`` with ``V = D^T A``
MOST = 0.7  # of the eigenvectors of a side, above which all of them are cheaper


@dataclass(frozen=True, eq=False)
class Head(TensorObject):
    """Leading eigenvectors of both factors, the spectrum ``d`` along them, and the mean eigenvalues of the tails.

    ``sa``, ``sg``: the factors' own eigenvalues along them; ``ta``, ``tg``: means of the others, 0 where there are none.
    """

    ua: Tensor  # [s i p]
    ug: Tensor  # [s o q]
    d: Tensor  # [s q p]
    sa: Tensor  # [s p]
    sg: Tensor  # [s q]
    ta: Tensor  # [s]
    tg: Tensor  # [s]

    def floors(self, damping: Damping | Relative) -> tuple[Tensor, Tensor]:
        """``r_A``, ``r_G [s]`` of a damping of factors."""
        root = float(damping.value) ** 0.5
        if not isinstance(damping, Relative):
            return torch.full_like(self.ta, root), torch.full_like(self.tg, root)
        return root * _mean(self.sa, self.ta, self.ua.shape[-2]), root * _mean(self.sg, self.tg, self.ug.shape[-2])

    def shift(self, damping: Damping | Relative) -> Tensor:
        """``(s_A + r_A) (s_G + r_G) - s_A s_G``, what damping adds inside."""
        ra, rg = (r[:, None, None] for r in self.floors(damping))
        return ra * rg + rg * self.sa.unsqueeze(-2) + ra * self.sg.unsqueeze(-1)

    def down(self, v: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """``U_G^T V U_A``, ``U_G^T V`` and ``V U_A`` of a gradient ``v [s, o, i]``."""
        if rows is None:
            p = self.ug.mT @ v
            return p @ self.ua, p, v @ self.ua
        d, a = rows
        left, right = (d @ self.ug[0]).mT, a @ self.ua[0]
        return (left @ right)[None], (left @ a)[None], (d.mT @ right)[None]

    def up(self, v: Tensor, parts: tuple[Tensor, Tensor, Tensor], w: Tensor, inverse: Inverse) -> Tensor:
        """The preconditioned gradient, of ``v [s, o, i]`` with its ``parts`` by :meth:`down`, which is ``w`` inside."""
        inside, p, q = parts
        b, c, z = inverse
        e = w - (b + c - z) * inside
        out = torch.baddbmm(((b - z) * q) @ self.ua.mT, self.ug, ((c - z) * p).baddbmm_(e, self.ua.mT))
        return out.addcmul_(z, v)

    def inverse(self, damping: Damping | Relative, power: float) -> Inverse:
        """``b [s, 1, p]``, ``c [s, q, 1]`` and ``z [s, 1, 1]``."""
        ra, rg = (r[:, None, None] for r in self.floors(damping))
        sa, sg = self.sa.unsqueeze(-2) + ra, self.sg.unsqueeze(-1) + rg
        ta, tg = self.ta[:, None, None] + ra, self.tg[:, None, None] + rg
        return (sa * tg).pow(-power), (ta * sg).pow(-power), (ta * tg).pow(-power)


Inverse = tuple[Tensor, Tensor, Tensor]
Block.kinds.add(Head)  # type: ignore[arg-type]


def head(
    block: KroneckerBlock, damping: Damping | Relative, drowned: float, old: Head | None, least: int
) -> Head | None:
    """Leading eigenvectors, those whose eigenvalues are above ``drowned`` times what ``damping`` adds to their factor;
    ``None`` where all of them are cheaper, or damping is no sum with the factors.

    From an ``old`` one by a step of orthogonal iteration, with some random vectors beside so that it can grow. Sides up
    to ``least`` are kept whole.
    """
    if not (isinstance(damping, FactoredTikhonov) or (isinstance(damping, Relative) and damping.factored)):
        return None
    if any(linalg.is_diagonal(f) for f in (block.a, block.g)) or max(block.a.shape[-1], block.g.shape[-1]) <= least:
        return None
    sides = []
    for factor, u in ((block.a, old and old.ua), (block.g, old and old.ug)):
        mean = linalg.factor_diag(factor).mean(-1, keepdim=True)
        floor = float(damping.value) ** 0.5 * (mean if isinstance(damping, Relative) else torch.ones_like(mean))
        sides.append(_leading(factor, drowned * floor, u, least))
    (ua, sa, ta), (ug, sg, tg) = sides
    if ua.shape[-1] * ug.shape[-2] + ug.shape[-1] * ua.shape[-2] > MOST * 2 * ua.shape[-2] * ug.shape[-2]:
        return None
    return Head(ua, ug, sg.unsqueeze(-1) * sa.unsqueeze(-2), sa, sg, ta, tg)


def _leading(factor: Tensor, floor: Tensor, u: Tensor | None, least: int) -> tuple[Tensor, Tensor, Tensor]:
    side = factor.shape[-1]
    if u is None or side <= least or u.shape[-1] > MOST * side:
        values, vectors = linalg.factor_eigh(factor)
        values, vectors = values.flip(-1), vectors.flip(-1)  # type: ignore[union-attr]
    else:
        values, vectors = iterated(factor, _wider(u))
    k = side if side <= least else max(1, int((values > floor).sum(-1).max()))
    values, vectors = values[..., :k].clamp_min(0), vectors[..., :k].contiguous()
    rest = (linalg.factor_diag(factor).sum(-1) - values.sum(-1)).clamp_min(0)
    return vectors, values, rest / max(1, side - k)


def iterated(factor: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration: ``QR(F U)`` and its Rayleigh quotients, descending."""
    turned = factor @ u
    order = (turned * u).sum(-2).argsort(-1, descending=True)  # the largest first, for the others are made orthogonal
    u, _ = torch.linalg.qr(turned.gather(-1, order.unsqueeze(-2).expand_as(turned)))
    values = ((factor @ u) * u).sum(-2)
    values, order = values.sort(-1, descending=True)
    return values, u.gather(-1, order.unsqueeze(-2).expand_as(u))


def _wider(u: Tensor) -> Tensor:
    """An eighth more vectors, random ones."""
    s, side, k = u.shape
    more = min(side - k, k // 8 + 8)
    generator = torch.Generator().manual_seed(k)
    new = torch.randn(s, side, more, generator=generator, dtype=torch.float64).to(u) / side**0.5
    return torch.cat([u, new], -1)


def _mean(values: Tensor, tail: Tensor, side: int) -> Tensor:
    return (values.sum(-1) + tail * (side - values.shape[-1])) / side
