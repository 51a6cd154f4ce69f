"""The leading part of a Kronecker-factored eigenbasis: eigenvectors that the damping drowns are not needed one by one.

Damped factor by factor, ``(A + r_A) (x) (G + r_G)``, directions of ``A`` whose eigenvalues are small against ``r_A``
are all divided alike. They count as one eigenvalue, their mean ``t_A``, and so on the side of ``G``: outside of the
leading eigenvectors ``U_A [i, p]``, ``U_G [o, q]`` the preconditioner is that of KFAC, and a product of projections;
inside it has any spectrum. With ``b = 1 / ((s_A + r_A) (t_G + r_G))``, ``c = 1 / ((t_A + r_A) (s_G + r_G))``, and ``z``
of both tails,

    (1 - P_G) [z V (1 - P_A) + V U_A b U_A^T] + U_G [c U_G^T V (1 - P_A) + w U_A^T],  P = U U^T

for a gradient ``V`` that is ``w`` inside. Eigenvectors whose own inverse is much smaller than ``z`` are projected off
twice: what the first leaves of them by rounding would be multiplied by ``z``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.damping import Damping, FactoredTikhonov, Relative
from nngeom.pmat.block import Block, TensorObject
from nngeom.pmat.kronecker import KroneckerBlock

Rows = tuple[Tensor, Tensor] | None  # ``D [r, o]``, ``A [r, i]`` with ``V = D^T A``
MOST = 0.7  # of the eigenvectors of a side, above which all of them are cheaper
START = 3  # steps of orthogonal iteration from random vectors
LEFT = 1e-4  # of an eigenvector, what rounding may leave of it once it is divided as the tail is


@dataclass(frozen=True, eq=False)
class Parts:
    """A gradient ``V [s, o, i]`` in and outside of the leading eigenvectors.

    ``inside [s, q, p]``: ``U_G^T V U_A``; ``edge [s, q, i]``: ``U_G^T V (1 - P_A)``; ``side`` and ``rest``: ``(1 -
    P_G) V U_A`` and ``(1 - P_G) V (1 - P_A)``, or what they are ``left^T`` times.
    """

    inside: Tensor
    edge: Tensor
    side: Tensor
    rest: Tensor
    left: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Head(TensorObject):
    """Leading eigenvectors of both factors, the spectrum ``d`` along them, and the mean eigenvalues of the tails.

    ``sa``, ``sg``: the factors' own eigenvalues along them; ``ta``, ``tg``: means of the others, 0 without others.
    """

    ua: Tensor  # [s i p]
    ug: Tensor  # [s o q]
    d: Tensor  # [s q p]
    sa: Tensor  # [s p]
    sg: Tensor  # [s q]
    ta: Tensor  # [s]
    tg: Tensor  # [s]
    dropped: ClassVar[None] = None  # of the factors: they are whole

    @property
    def costs(self) -> tuple[int, int]:
        """Multiplications of one row's projections on either side, and on that of inputs of the way back."""
        (o, q), (i, p) = self.ug.shape[1:], self.ua.shape[1:]
        return o * q * (1 if q == o else 2), i * p * (2 if p == i else 3)

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

    def down(self, v: Tensor, rows: Rows, large: tuple[int, int]) -> Parts:
        """The four parts of a gradient ``v [s, o, i]``, by its ``rows`` where these are cheaper; ``large``: of the
        eigenvectors of either side, those that are projected off twice.
        """
        on_a, on_g = large
        if rows is None:
            p, tail = _split(v.mT, self.ug, on_g)  # on the side of G: [s i q] and [s i o]
            inside, edge = _split(p.mT, self.ua, on_a)
            side, rest = _split(tail.mT, self.ua, on_a)
            return Parts(inside, edge, side, rest)
        d, a = rows
        left, d = _split(d[None], self.ug, on_g)
        right, a = _split(a[None], self.ua, on_a)
        return Parts(left.mT @ right, left.mT @ a, right, a, d)

    def large(self, damping: Damping | Relative, power: float) -> tuple[int, int]:
        """How many eigenvectors of either side stand out so far that rounding would show."""
        limit = (LEFT / torch.finfo(self.sa.dtype).eps) ** (1 / power)
        pairs = zip(self.floors(damping), (self.sa, self.sg), (self.ta, self.tg))
        on_a, on_g = (int((s + r[:, None] > limit * (t + r)[:, None]).sum(-1).max()) for r, s, t in pairs)
        return on_a, on_g

    def up(self, parts: Parts, w: Tensor, inverse: Inverse, out: Tensor) -> None:
        """The preconditioned gradient of which ``parts`` are given, into ``out``: ``w [s, q, p]`` inside, by
        ``inverse`` outside.
        """
        b, c, z = inverse
        rest = torch.mul(parts.rest, z, out=out if parts.left is None else None)
        rest.baddbmm_(parts.side * b, self.ua.mT)
        if parts.left is not None:
            torch.bmm(parts.left.mT, rest, out=out)
        out.baddbmm_(self.ug, (parts.edge * c).baddbmm_(w, self.ua.mT))

    def inverse(self, damping: Damping | Relative, power: float) -> Inverse:
        """``b [s, 1, p]``, ``c [s, q, 1]`` and ``z [s, 1, 1]`` under a ``damping``, to the ``-power``."""
        ra, rg = (r[:, None, None] for r in self.floors(damping))
        sa, sg = self.sa.unsqueeze(-2) + ra, self.sg.unsqueeze(-1) + rg
        ta, tg = self.ta[:, None, None] + ra, self.tg[:, None, None] + rg
        return (sa * tg).pow(-power), (ta * sg).pow(-power), (ta * tg).pow(-power)


Inverse = tuple[Tensor, Tensor, Tensor]
Block.kinds.add(Head)


@dataclass(frozen=True)
class Leading:
    """Which eigenvectors lead, and how they are found.

    Args:
        drowned: those whose eigenvalues are above so much of what damping adds to their factor.
        least: sides up to which a factor is kept whole.
        exact: by eigendecompositions; else by orthogonal iteration, from the last ones or from random vectors.
    """

    drowned: float
    least: int
    exact: bool

    def of(self, block: KroneckerBlock, damping: Damping | Relative, old: Head | None) -> Head | None:
        """The head of a ``block``, from an ``old`` one; ``None`` where all eigenvectors are cheaper, or ``damping`` is
        not that of factors.
        """
        if not (isinstance(damping, FactoredTikhonov) or (isinstance(damping, Relative) and damping.factored)):
            return None
        pair = (block.a, block.g)
        if any(linalg.is_diagonal(f) for f in pair) or max(f.shape[-1] for f in pair) <= self.least:
            return None
        sides = []
        for factor, u in zip(pair, (None, None) if old is None else (old.ua, old.ug)):
            mean = linalg.factor_diag(factor).mean(-1, keepdim=True)
            floor = float(damping.value) ** 0.5 * (mean if isinstance(damping, Relative) else torch.ones_like(mean))
            sides.append(self._side(factor, self.drowned * floor, u))
        (ua, sa, ta), (ug, sg, tg) = sides
        if ua.shape[-1] / ua.shape[-2] + ug.shape[-1] / ug.shape[-2] > 2 * MOST:
            return None
        return Head(ua, ug, sg.unsqueeze(-1) * sa.unsqueeze(-2), sa=sa, sg=sg, ta=ta, tg=tg)

    def _side(self, factor: Tensor, floor: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvectors, eigenvalues and the mean of the others."""
        side = factor.shape[-1]
        values, vectors = self._eigen(factor, floor, u)
        k = side if side <= self.least else max(1, int((values > floor).sum(-1).max()))
        values, vectors = values[..., :k].clamp_min(0), vectors[..., :k].contiguous()
        rest = (linalg.factor_diag(factor).sum(-1) - values.sum(-1)).clamp_min(0)
        return vectors, values, rest / max(1, side - k)

    def _eigen(self, factor: Tensor, floor: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
        """All eigenvalues above the ``floor`` and their eigenvectors, and perhaps others, descending."""
        s, side, _ = factor.shape
        if not self.exact and side > self.least:
            rounds = START if u is None else 1
            u = factor.new_zeros(s, side, 0) if u is None else u
            vectors = torch.cat(
                [u, random_columns(u, min(side, max(side // 3, u.shape[-1] + u.shape[-1] // 8 + 8)))], -1
            )
            for _ in range(rounds):
                vectors, _ = turned(factor, vectors)
            values, turn = linalg.eigh(vectors.mT @ factor @ vectors)  # Ritz vectors: neighbours mix for long
            values, vectors = values.flip(-1), vectors @ turn.flip(-1)
            if bool((values[..., -1:] <= floor).all()):
                return values, vectors
        all_values, all_vectors = linalg.factor_eigh(factor)
        return all_values.flip(-1), all_vectors.flip(-1)  # type: ignore[union-attr]


def _split(x: Tensor, u: Tensor, twice: int) -> tuple[Tensor, Tensor]:
    """``x u`` and ``x (1 - u u^T)`` of rows ``x [s, r, p]``, of the first columns ``twice``; nothing is left of all
    eigenvectors.
    """
    inside = x @ u
    if u.shape[-1] == u.shape[-2]:
        return inside, torch.zeros_like(x)
    rest = torch.baddbmm(x, inside, u.mT, alpha=-1)
    if twice:
        first = u[..., :twice]
        rest.baddbmm_(rest @ first, first.mT, alpha=-1)
    return inside, rest


def turned(factor: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration, ``QR(F U)``, and the Rayleigh quotients of ``U``, descending."""
    product = factor @ u
    values, order = (product * u).sum(-2).sort(-1, descending=True)  # for later ones are made orthogonal to the largest
    u, _ = torch.linalg.qr(product.gather(-1, order.unsqueeze(-2).expand_as(product)))
    return u, values


def iterated(factor: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The same, with the Rayleigh quotients of what it leads to, descending."""
    u, _ = turned(factor, u)
    values, order = ((factor @ u) * u).sum(-2).sort(-1, descending=True)
    return u.gather(-1, order.unsqueeze(-2).expand_as(u)), values


def random_columns(u: Tensor, count: int) -> Tensor:
    """So many random vectors as ``u [s, p, k]`` has less than ``count``, the same every time."""
    s, side, k = u.shape
    generator = torch.Generator().manual_seed(count)
    new = torch.randn(s, side, max(0, count - k), generator=generator, dtype=u.dtype)
    return new.to(u.device).div_(side**0.5)


def _mean(values: Tensor, tail: Tensor, side: int) -> Tensor:
    return (values.sum(-1) + tail * (side - values.shape[-1])) / side
