"""Two Kronecker products brought to diagonal form together, which needs one of them to be definite.

With ``V_a^T B V_a = I, V_a^T A V_a = diag(alpha)`` and the same of ``H, G``, and ``V = V_g (x) V_a``::

    B (x) H + w A (x) G  =  V^-T (1 + w alpha gamma) V^-1

(Golub & Van Loan 2013, section 8.7.2). What is added to both of them, damping, has no such form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import bases, linalg
from nngeom.core.damping import Damping
from nngeom.core.errors import SingularError
from nngeom.core.linalg import Basis
from nngeom.pmat.block import Block, BlockBasis
from nngeom.pmat.block_algebra import Remake
from nngeom.pmat.eigenvalues import log_sum, rounding
from nngeom.pmat.group import GroupBlock, by_group
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.near import along, partial_traces
from nngeom.pmat.turned import turned

CONDITION = 1e-6  # of pivots of a definite factor: below, too few digits are left


@dataclass(frozen=True, eq=False)
class CongruentBlock(Block):
    """``x -> vg (d * (vg^T x va)) va^T``, where ``va``, ``vg`` need not be orthogonal."""

    va: Tensor  # [s i i] or [s i]
    vg: Tensor  # [s o o] or [s o]
    d: Tensor  # [s o i]

    @property
    def sizes(self) -> torch.Size:
        return self.d.shape

    def mv(self, x: Tensor) -> Tensor:
        inner = linalg.right(linalg.left(self.vg, x, transpose=True), self.va)
        return self.root(self.d * inner, 1.0)

    def root(self, x: Tensor, d: Tensor | float) -> Tensor:
        """``V (d x)``."""
        return linalg.right(linalg.left(self.vg, d * x), self.va, transpose=True)

    def diag(self) -> Tensor:
        va, vg = (torch.diag_embed(v) if linalg.is_diagonal(v) else v for v in (self.va, self.vg))
        return vg.square() @ self.d @ va.square().mT

    def squared_norm(self) -> Tensor:
        a, g = (v.square() if linalg.is_diagonal(v) else v.mT @ v for v in (self.va, self.vg))
        return (linalg.right(linalg.left(g * g, self.d), a * a) * self.d).sum()

    def scaled(self, c: float | Tensor) -> CongruentBlock:
        return CongruentBlock(self.va, self.vg, c * self.d)

    def inverse(self, damping: Damping) -> Block:
        return self.grouped().inverse(damping)

    def spectrum(self) -> tuple[Tensor, Remake]:
        return self.grouped().spectrum()

    def eigh(self) -> tuple[Tensor, BlockBasis]:
        return self.grouped().eigh()

    def grouped(self) -> GroupBlock:
        """Made dense."""
        s, o, i = self.sizes
        eye = torch.eye(o * i, dtype=self.d.dtype, device=self.d.device).view(o * i, 1, o, i)
        return GroupBlock(self.mv(eye.expand(-1, s, -1, -1)).flatten(2).transpose(0, 1), s, o, i)


@by_group.register
def _(block: CongruentBlock) -> Tensor:
    return block.grouped().m


@partial_traces.register
def _(block: CongruentBlock) -> tuple[Tensor, Tensor]:
    na, ng = (v.square() if linalg.is_diagonal(v) else v.square().sum(-2) for v in (block.va, block.vg))
    return (
        _spanned(block.va, (ng.unsqueeze(-1) * block.d).sum(-2)),
        _spanned(block.vg, (na.unsqueeze(-2) * block.d).sum(-1)),
    )


def _spanned(v: Tensor, values: Tensor) -> Tensor:
    return v.square() * values if linalg.is_diagonal(v) else bases.spanned(v, values)


@along.register
def _(block: CongruentBlock, ua: Basis | None, ug: Basis | None) -> Tensor:
    return _squares_along(ua, block.va, _squares_along(ug, block.vg, block.d).mT).mT


def _squares_along(u: Basis | None, v: Tensor, d: Tensor) -> Tensor:
    if linalg.is_diagonal(v):
        return bases.squares_transposed_times(u, v.square().unsqueeze(-1) * d)
    return bases.overlaps_times(u, v, d)


@turned.register
def _(block: CongruentBlock, ua: Tensor | None, ug: Tensor | None) -> CongruentBlock:
    return CongruentBlock(_turned_side(ua, block.va), _turned_side(ug, block.vg), block.d)


def _turned_side(u: Tensor | None, v: Tensor) -> Tensor:
    if u is None:
        return v
    return u.mT * v.unsqueeze(-2) if linalg.is_diagonal(v) else u.mT @ v


@dataclass(frozen=True)
class Pencil:
    """A definite sum of two Kronecker products: its inverse, and the logarithm of its determinant."""

    inverse: CongruentBlock
    logdet: Tensor

    def root_times(self, noise: Tensor) -> Tensor:
        """``P^-1/2 noise`` up to a rotation."""
        return self.inverse.root(noise, self.inverse.d.sqrt())


def pencil(first: KroneckerBlock, second: KroneckerBlock) -> Pencil | None:
    """The sum of two, one of them definite, and positive definite itself; else ``None``."""
    for sure, other in ((first, second), (second, first)):
        try:
            (va, alpha, logdet_a), (vg, gamma, logdet_g) = _side(sure.a, other.a), _side(sure.g, other.g)
        except SingularError:
            continue
        shifted = 1 + gamma.unsqueeze(-1) * alpha.unsqueeze(-2)
        if bool(shifted.min() <= rounding(shifted)):
            return None
        _, o, i = sure.sizes
        logdet = o * logdet_a.sum() + i * logdet_g.sum() + log_sum(shifted)
        return Pencil(CongruentBlock(va, vg, 1 / shifted), logdet)
    return None


def _side(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``v, alpha, log det b`` with ``v^T b v = I, v^T a v = diag(alpha)``; raises where ``b`` is not definite."""
    if linalg.is_diagonal(b) and linalg.is_diagonal(a):
        if bool((b <= 0).any()):
            raise SingularError("a factor is singular")
        return b.rsqrt(), a / b, b.log().sum(-1)
    a, b = (torch.diag_embed(f) if linalg.is_diagonal(f) else f for f in (a, b))
    low = linalg.cholesky(b, "a factor")
    pivots = low.detach().diagonal(dim1=-2, dim2=-1).square()
    if bool((pivots.amin(-1) <= CONDITION * pivots.amax(-1)).any()):
        raise SingularError("a factor is nearly singular")
    half = torch.linalg.solve_triangular(low, a, upper=False)
    inner = torch.linalg.solve_triangular(low, half.mT, upper=False)
    alpha, u = linalg.eigh((inner + inner.mT) / 2)
    v = torch.linalg.solve_triangular(low.mT, u, upper=True)
    return v, alpha, 2 * low.diagonal(dim1=-2, dim2=-1).log().sum(-1)
