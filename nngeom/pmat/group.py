"""Dense blocks along a diagonal, and any other block as such: what is left where no structure is."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.damping import Damping, Tikhonov
from nngeom.core.errors import SingularError
from nngeom.pmat.block import Block, BlockBasis, EyeBlock
from nngeom.pmat.block_algebra import Remake
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.eigenvalues import by_eigenvalues, definite_factor, log_sum, reciprocal, shifted, zero_small
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.pmat.quasi_diag import ArrowBlock, SpikeBlock, UnitBlock

SUM = "the sum of matrices"


@dataclass(frozen=True, eq=False)
class GroupBlock(Block):
    """A dense symmetric matrix a group, over runs of ``q`` entries of the flattened block ``[s, o, i]``."""

    m: Tensor  # [g q q], g q = s o i
    s: int
    o: int
    i: int

    @property
    def sizes(self) -> torch.Size:
        return torch.Size((self.s, self.o, self.i))

    def mv(self, x: Tensor) -> Tensor:
        return grouped_product(self.m, x)

    def diag(self) -> Tensor:
        return self.m.diagonal(dim1=-2, dim2=-1).reshape(self.sizes)

    def squared_norm(self) -> Tensor:
        return self.m.square().sum()

    def scaled(self, c: float | Tensor) -> GroupBlock:
        return self._with(c * self.m)

    def added(self, other: Block) -> Block | None:
        if not isinstance(other, GroupBlock):
            return None
        groups = min(len(self.m), len(other.m))
        return self._with(coarser(self.m, groups) + coarser(other.m, groups))

    def inverse(self, damping: Damping) -> Block:
        if by_eigenvalues(damping):
            values, u = linalg.eigh(self.m)
            return self._with((u * reciprocal(values, damping, SUM).unsqueeze(-2)) @ u.mT)
        return self._with(torch.cholesky_inverse(definite_factor(self.m, damping, SUM)))

    def solve(self, b: Tensor, damping: Damping) -> Tensor:
        if by_eigenvalues(damping):
            return self.inverse(damping).mv(b)
        x = b.reshape(-1, *self.m.shape[:2]).permute(1, 2, 0)
        return torch.cholesky_solve(x, definite_factor(self.m, damping, SUM)).permute(2, 0, 1).reshape(b.shape)

    def logdet(self, damping: Tikhonov) -> Tensor:
        """Of the Cholesky pivots: without damping ``-inf`` exactly where :meth:`solve` raises."""
        try:
            return linalg.cholesky_logdet(*shifted(self.m, damping, SUM)).sum()
        except SingularError:
            return super().logdet(damping) if damping.value > 0 else log_sum(self.m.new_zeros(1) + damping.value)

    def root_times(self, noise: Tensor, damping: Tikhonov) -> Tensor:
        runs = noise.reshape(-1, *self.m.shape[:2]).permute(1, 2, 0)
        upper = definite_factor(self.m, damping, SUM).mT
        result: Tensor = torch.linalg.solve_triangular(upper, runs, upper=True).permute(2, 0, 1).reshape(noise.shape)
        return result

    def eigh(self) -> tuple[Tensor, GroupBasis]:
        values, u = linalg.eigh(self.m)
        return zero_small(values).reshape(self.sizes), GroupBasis(u)

    def spectrum(self) -> tuple[Tensor, Remake]:
        values, basis = self.eigh()
        return values, lambda f: self._with((basis.u * f.reshape(len(self.m), 1, -1)) @ basis.u.mT)

    def _with(self, m: Tensor) -> GroupBlock:
        return GroupBlock(m, self.s, self.o, self.i)


@dataclass(frozen=True, eq=False)
class GroupBasis(BlockBasis):
    """Explicit eigenvectors of every group, the columns of ``u``."""

    u: Tensor  # [g q q]

    def mv(self, x: Tensor) -> Tensor:
        return grouped_product(self.u, x)

    def tmv(self, x: Tensor) -> Tensor:
        return grouped_product(self.u.mT, x)


def grouped_product(m: Tensor, x: Tensor) -> Tensor:
    """``m [g, q, q]`` times every run of ``x [*b, s, o, i]``."""
    runs = x.reshape(-1, *m.shape[:2]).permute(1, 2, 0)
    return (m @ runs).permute(2, 0, 1).reshape(x.shape)


def coarser(m: Tensor, groups: int) -> Tensor:
    """``[g, q, q]`` as ``[groups, q', q']``: neighbours side by side on the diagonal of a larger matrix."""
    g, q, _ = m.shape
    if g == groups:
        return m
    r = g // groups
    out = m.new_zeros(groups, r, q, r, q)
    out.diagonal(dim1=1, dim2=3).copy_(m.view(groups, r, q, q).permute(0, 2, 3, 1))
    return out.view(groups, r * q, r * q)


@functools.singledispatch
def groups(block: Block) -> int:
    """Into how many runs of its flattened entries a block falls apart; one where nothing is known."""
    return 1


@groups.register(EyeBlock)
@groups.register(DiagBlock)
def _(block: Block) -> int:
    return block.sizes.numel()


@groups.register(ArrowBlock)
@groups.register(SpikeBlock)
@groups.register(UnitBlock)
def _(block: Block) -> int:
    return block.sizes[0] * block.sizes[1]


@groups.register(KroneckerBlock)
@groups.register(EigenBlock)
def _(block: KroneckerBlock | EigenBlock) -> int:
    return block.sizes[0]


@groups.register
def _(block: GroupBlock) -> int:
    return len(block.m)


@functools.singledispatch
def by_group(block: Block) -> Tensor:
    """``[g, q, q]``: the entries of a block in each of its :func:`groups`."""
    return block.dense()[None]


@by_group.register(EyeBlock)
@by_group.register(DiagBlock)
def _(block: Block) -> Tensor:
    return block.diag().reshape(-1, 1, 1)


@by_group.register(ArrowBlock)
@by_group.register(SpikeBlock)
def _(block: ArrowBlock | SpikeBlock) -> Tensor:
    return block.units().flatten(0, 1)


@by_group.register
def _(block: UnitBlock) -> Tensor:
    return block.m.flatten(0, 1)


@by_group.register
def _(block: KroneckerBlock) -> Tensor:
    a, g = (torch.diag_embed(f) if linalg.is_diagonal(f) else f for f in (block.a, block.g))
    s, o, i = block.sizes
    return (g[:, :, None, :, None] * a[:, None, :, None, :]).reshape(s, o * i, o * i)


@by_group.register
def _(block: EigenBlock) -> Tensor:
    s, o, i = block.sizes
    eye = torch.eye(o * i, dtype=block.d.dtype, device=block.d.device).view(o * i, 1, o, i)
    return block.mv(eye.expand(-1, s, -1, -1)).flatten(2).transpose(0, 1)


@by_group.register
def _(block: GroupBlock) -> Tensor:
    return block.m
