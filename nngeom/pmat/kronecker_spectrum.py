"""A Kronecker product by the eigenvalues and eigenvectors of its factors: what is held of factors that are too long."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nngeom.core import bases
from nngeom.core.damping import Damping, FactoredTikhonov
from nngeom.core.linalg import Basis, factor_eigh
from nngeom.core.sketch import is_sketched
from nngeom.pmat.block import Block
from nngeom.pmat.block_algebra import Remake
from nngeom.pmat.closed import plus
from nngeom.pmat.group import by_group, groups
from nngeom.pmat.inner import inner
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.pmat.kronecker_basis import KroneckerBasis
from nngeom.pmat.merged_side import Side, merged_side
from nngeom.pmat.metric import both, left, right
from nngeom.pmat.near import along, partial_traces
from nngeom.pmat.shifted import factors_shifted


@dataclass(frozen=True, eq=False)
class KroneckerSpectrumBlock(Block):
    """``(ug diag(sg) ug^T) (x) (ua diag(sa) ua^T)``; ``dropped``: as of a :class:`KroneckerBlock`."""

    ua: Basis | None  # [s i i]
    ug: Basis | None  # [s o o]
    sa: Tensor  # [s i]
    sg: Tensor  # [s o]
    dropped: Tensor | None = None

    @staticmethod
    def of(block: KroneckerBlock) -> Block:
        """A Kronecker product with sketched factors; itself where there are none."""
        if not (is_sketched(block.a) or is_sketched(block.g)):
            return block
        (sa, ua), (sg, ug) = factor_eigh(block.a), factor_eigh(block.g)
        return KroneckerSpectrumBlock(ua, ug, sa, sg, block.dropped)

    @property
    def sizes(self) -> torch.Size:
        return torch.Size((self.sa.shape[0], self.sg.shape[1], self.sa.shape[1]))

    def eigen(self) -> EigenBlock:
        """The same with the spectrum of the product, which may be replaced by any other."""
        return EigenBlock.of_factors((self.sa, self.ua), (self.sg, self.ug), self.dropped)

    @property
    def diagonal(self) -> KroneckerBlock:
        """What it is in its eigenbasis."""
        return KroneckerBlock(self.sa, self.sg)

    def of_diagonal_factors(self, block: KroneckerBlock) -> KroneckerSpectrumBlock:
        """In the same basis, of a ``block`` of diagonal factors."""
        return replace(self, sa=block.a, sg=block.g)

    def mv(self, x: Tensor) -> Tensor:
        basis = KroneckerBasis(self.ua, self.ug)
        return basis.mv(self.diagonal.mv(basis.tmv(x)))

    def diag(self) -> Tensor:
        g, a = (bases.squares_times(u, values.unsqueeze(-1)) for u, values in ((self.ug, self.sg), (self.ua, self.sa)))
        return g * a.mT

    def trace(self) -> Tensor:
        return self.diagonal.trace()

    def squared_norm(self) -> Tensor:
        return self.diagonal.squared_norm()

    def spectral_norm(self) -> Tensor:
        return self.diagonal.spectral_norm()

    def scaled(self, c: float | Tensor) -> KroneckerSpectrumBlock:
        return self.of_diagonal_factors(self.diagonal.scaled(c))

    def merged(self, other: Block, mine: float, theirs: float) -> Block | None:
        """The means of the factors of this and ``other``, weighted by ``mine`` and ``theirs``: leading eigenvectors of
        those and a diagonal, as of sums over both data sets.
        """
        if not isinstance(other, KroneckerSpectrumBlock) or self.sizes != other.sizes:
            return None
        sides = [merged_side(self.side(j), other.side(j), mine, theirs) for j in range(2)]
        if any(side is None for side in sides):
            return None
        (a, lost_a), (g, lost_g) = sides  # type: ignore[misc]
        return KroneckerSpectrumBlock.of(KroneckerBlock(a, g, (), torch.stack([lost_a, lost_g])))

    def side(self, j: int) -> Side:
        """The eigenvectors and eigenvalues of the ``j``-th of both factors, and what of it is not kept."""
        u, values = ((self.ua, self.sa), (self.ug, self.sg))[j]
        return Side(u, values, None if self.dropped is None else self.dropped[j])

    def inverse(self, damping: Damping) -> Block:
        if isinstance(damping, FactoredTikhonov):
            return replace(self.of_diagonal_factors(self.diagonal.factored_inverse(damping)), dropped=None)
        return self.eigen().inverse(damping)

    def eigh(self) -> tuple[Tensor, KroneckerBasis]:
        return self.diagonal.diag(), KroneckerBasis(self.ua, self.ug)

    def spectrum(self) -> tuple[Tensor, Remake]:
        return self.eigen().spectrum()

    def factor_power(self, p: float) -> KroneckerSpectrumBlock | None:
        """Factor by factor, as of a :class:`KroneckerBlock`."""
        found = self.diagonal.factor_power(p)
        return None if found is None else replace(self.of_diagonal_factors(found), dropped=None)


def in_eigenbasis(block: Block) -> Block:
    """An :class:`EigenBlock` in place of a Kronecker product by eigenvalues; other blocks as they are."""
    return block.eigen() if isinstance(block, KroneckerSpectrumBlock) else block


left.register(KroneckerSpectrumBlock, lambda block, x: left(block.eigen(), x))
right.register(KroneckerSpectrumBlock, lambda block, y: right(block.eigen(), y))
both.register(KroneckerSpectrumBlock, lambda block, x: both(block.eigen(), x))
groups.register(KroneckerSpectrumBlock, lambda block: block.sizes[0])
by_group.register(KroneckerSpectrumBlock, lambda block: by_group(block.eigen()))
partial_traces.register(KroneckerSpectrumBlock, lambda block: None)
along.register(KroneckerSpectrumBlock, lambda block, ua, ug: along(block.eigen(), ua, ug))
inner.register(KroneckerSpectrumBlock, lambda x, y: inner(x.eigen(), in_eigenbasis(y)))
plus.register(KroneckerSpectrumBlock, lambda x, y: plus(x.eigen(), in_eigenbasis(y)))


@factors_shifted.register
def _(block: KroneckerSpectrumBlock, c: float | Tensor) -> KroneckerSpectrumBlock | None:
    shifted = factors_shifted(block.diagonal, c)
    return None if shifted is None else block.of_diagonal_factors(shifted)  # type: ignore[arg-type]
