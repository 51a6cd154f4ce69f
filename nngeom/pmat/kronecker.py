"""Blocks with Kronecker structure: a product of two factors, and any spectrum in the eigenbasis of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import bases, linalg
from nngeom.core.damping import Damping, FactoredTikhonov
from nngeom.core.factor_inverses import factor_inverses
from nngeom.core.linalg import Basis
from nngeom.core.sketch import side_of
from nngeom.pmat.block import Block, BlockBasis
from nngeom.pmat.block_algebra import Remake, largest
from nngeom.pmat.eigenvalues import by_eigenvalues, reciprocal, require_positive
from nngeom.pmat.factors import product_of_marginals
from nngeom.pmat.kept import kept_factor
from nngeom.pmat.kronecker_basis import KroneckerBasis


@dataclass(frozen=True, eq=False)
class KroneckerBlock(Block):
    """``x -> g x a`` with ``a`` over inputs and ``g`` over output gradients, both dense or diagonal.

    ``uses``: the factors ``a, g`` of every use, where there are several unlike ones; their means merge, the joined
    ones' do not. ``dropped``: of both factors the share of the norm that is not kept, and its error.
    """

    a: Tensor  # [s i i] or [s i]
    g: Tensor  # [s o o] or [s o]
    uses: tuple[Tensor, ...] = ()
    dropped: Tensor | None = None  # [2 3], of a and g: the share of the norm not kept, -1: none; its error; the side

    @property
    def sizes(self) -> torch.Size:
        return torch.Size((self.a.shape[0], self.g.shape[-1], self.a.shape[-1]))

    def mv(self, x: Tensor) -> Tensor:
        return linalg.right(linalg.left(self.g, x), self.a)

    def diag(self) -> Tensor:
        return linalg.factor_diag(self.g).unsqueeze(-1) * linalg.factor_diag(self.a).unsqueeze(-2)

    def trace(self) -> Tensor:
        return (linalg.factor_diag(self.g).sum(-1) * linalg.factor_diag(self.a).sum(-1)).sum()

    def squared_norm(self) -> Tensor:
        return (linalg.factor_norm2(self.a) * linalg.factor_norm2(self.g)).sum()

    def scaled(self, c: float | Tensor) -> KroneckerBlock:
        uses = tuple(c * f if q % 2 else f for q, f in enumerate(self.uses))
        return KroneckerBlock(self.a, c * self.g, uses, self.dropped)

    def merged(self, other: Block, mine: float, theirs: float) -> Block | None:
        """The means of the factors, weighted by ``mine`` and ``theirs``: what one sweep over both data sets, this and
        ``other``, gives.
        """
        if not isinstance(other, KroneckerBlock) or [f.shape for f in self._factors] != [
            f.shape for f in other._factors
        ]:
            return None
        return KroneckerBlock.of(*(mine * x + theirs * y for x, y in zip(self._factors, other._factors)))

    @staticmethod
    def of(*factors: Tensor) -> KroneckerBlock:
        """From the ``factors`` ``a, g`` of one use, or ``a0, g0, a1, g1, ...`` of several unlike ones."""
        if len(factors) == 2:
            return KroneckerBlock(*factors)
        return KroneckerBlock(*product_of_marginals(list(zip(factors[::2], factors[1::2]))), factors)

    @property
    def _factors(self) -> tuple[Tensor, ...]:
        return self.uses or (self.a, self.g)

    def inverse(self, damping: Damping) -> Block:
        if isinstance(damping, FactoredTikhonov):
            return self.factored_inverse(damping)
        return self.eigen().inverse(damping)

    @property
    def is_exact(self) -> bool:
        """Whether it is a dense matrix over the inputs: of one output, whose factor is a number."""
        return self.g.shape[-1] == 1 and not linalg.is_diagonal(self.a)

    def solve(self, b: Tensor, damping: Damping) -> Tensor:
        if self.is_exact and not by_eigenvalues(damping):
            m = lambda: self.a * self.g.reshape(-1, 1, 1)
            factor = kept_factor(self, (self.a, self.g), m, damping, "the exact block")
            return torch.cholesky_solve(b.mT, factor.expand(*b.shape[:-2], *factor.shape[-2:])).mT
        if not isinstance(damping, FactoredTikhonov) or b.ndim > 3:
            return super().solve(b, damping)
        a, g = self.damped(damping)
        b = linalg.factor_solve(g, b, "the damped gradient factor")
        return linalg.factor_solve(a, b.mT, "the damped input factor").mT

    def factored_inverse(self, damping: FactoredTikhonov) -> KroneckerBlock:
        """The inverse under a ``damping``, factor by factor: of :meth:`damped`."""
        return factored_inverses([self], damping)[0]

    def damped(self, damping: FactoredTikhonov) -> tuple[Tensor, Tensor]:
        """``a + pi sqrt(x)`` and ``g + sqrt(x) / pi`` for a ``damping`` by ``x``; ``pi``: the root of the ratio of mean
        eigenvalues, or 1.
        """
        if side_of(self.g) == 1:  # a trivial factor: plain damping of the exact block
            exact = self.a * self.g.reshape(-1, *[1] * (self.a.ndim - 1))
            return linalg.factor_shift(exact, exact.new_zeros(len(exact)) + damping.value), torch.ones_like(self.g)
        shift_a, shift_g = self.shifts(damping)
        return linalg.factor_shift(self.a, shift_a), linalg.factor_shift(self.g, shift_g)

    def shifts(self, damping: FactoredTikhonov) -> tuple[Tensor, Tensor]:
        """``pi sqrt(x)`` and ``sqrt(x) / pi [s]``, which a ``damping`` by ``x`` adds to two factors."""
        if not damping.balanced:
            shift = self.a.new_ones(len(self.a)) * damping.value**0.5
            return shift, shift
        means = [linalg.factor_diag(f).mean(-1) for f in (self.a, self.g)]
        usable = (means[0] > 0) & (means[1] > 0)
        pi = torch.where(
            usable, (means[0] / means[1].where(usable, torch.ones_like(means[1]))).sqrt(), torch.ones_like(means[0])
        )
        root = damping.value**0.5
        return pi * root, root / pi

    def eigen(self) -> EigenBlock:
        """The same matrix in its eigenbasis."""
        return EigenBlock.of_factors(linalg.factor_eigh(self.a), linalg.factor_eigh(self.g), self.dropped)

    def eigh(self) -> tuple[Tensor, KroneckerBasis]:
        block = self.eigen()
        return block.d, KroneckerBasis(block.ua, block.ug)

    def spectrum(self) -> tuple[Tensor, Remake]:
        return self.eigen().spectrum()

    def spectral_norm(self) -> Tensor:
        sides = [linalg.factor_eigh(f)[0].abs().amax(-1) for f in (self.a, self.g)]
        return largest(sides[0] * sides[1])

    def factor_power(self, p: float) -> KroneckerBlock | None:
        """Factor by factor, ``g^p (x) a^p``; where one has eigenvalues that are not positive, by their products."""
        (sa, ua), (sg, ug) = linalg.factor_eigh(self.a), linalg.factor_eigh(self.g)
        values = sg.unsqueeze(-1) * sa.unsqueeze(-2)
        least = min(sa.min().item(), sg.min().item()) if values.numel() else 0.0
        if (p < 0 and least <= 0) or (p != int(p) and least < 0):
            return None
        if p < 0:
            require_positive(values, values, "the Kronecker product")
        return KroneckerBlock(bases.spanned(ua, sa**p), bases.spanned(ug, sg**p))

    def restricted(self, columns: list[int]) -> KroneckerBlock:
        inputs: Callable[[Tensor], Tensor] = lambda a: (
            a[..., columns] if linalg.is_diagonal(a) else a[..., columns, :][..., columns]
        )
        uses = tuple(f if q % 2 else inputs(f) for q, f in enumerate(self.uses))
        return KroneckerBlock(inputs(self.a), self.g, uses)


def factored_inverses(blocks: Sequence[KroneckerBlock], damping: FactoredTikhonov) -> list[KroneckerBlock]:
    """:meth:`KroneckerBlock.factored_inverse` of several ``blocks`` at once."""
    damped = [factor for block in blocks for factor in block.damped(damping)]
    found = factor_inverses(damped, ("the damped input factor", "the damped gradient factor") * len(blocks))
    return [KroneckerBlock(a, g) for a, g in zip(found[::2], found[1::2])]


@dataclass(frozen=True, eq=False)
class EigenBlock(Block):
    """Any spectrum in a Kronecker-factored eigenbasis: ``x -> ug (d * (ug^T x ua)) ua^T``.

    ``sa``, ``sg``: the eigenvalues of the factors that the basis came from, and what was ``dropped`` of these.
    """

    ua: Basis | None  # [s i i]
    ug: Basis | None  # [s o o]
    d: Tensor  # [s o i]
    sa: Tensor | None = None  # [s i], eigenvalues of the factors the basis came from
    sg: Tensor | None = None  # [s o]
    dropped: Tensor | None = None  # as of the factors

    @staticmethod
    def of_factors(
        a: tuple[Tensor, Basis | None], g: tuple[Tensor, Basis | None], dropped: Tensor | None = None
    ) -> EigenBlock:
        """The product of the factors ``a`` and ``g`` by the eigenvalues and eigenvectors of both, and what was
        ``dropped`` of these.
        """
        (sa, ua), (sg, ug) = a, g
        return EigenBlock(ua, ug, sg.unsqueeze(-1) * sa.unsqueeze(-2), sa, sg, dropped)

    @property
    def basis(self) -> KroneckerBasis:
        """The eigenvectors."""
        return KroneckerBasis(self.ua, self.ug)

    def mv(self, x: Tensor) -> Tensor:
        return self.basis.mv(self.d * self.basis.tmv(x))

    def diag(self) -> Tensor:
        return bases.squares_times(self.ua, bases.squares_times(self.ug, self.d).mT).mT

    @property
    def sizes(self) -> torch.Size:
        return self.d.shape

    def trace(self) -> Tensor:
        return self.d.sum()

    def squared_norm(self) -> Tensor:
        return self.d.square().sum()

    def scaled(self, c: float | Tensor) -> EigenBlock:
        return EigenBlock(self.ua, self.ug, c * self.d, self.sa, None if self.sg is None else c * self.sg, self.dropped)

    def merged(self, other: Block, mine: float, theirs: float) -> Block | None:
        """Mean eigenvalues of this and ``other``, weighted by ``mine`` and ``theirs``, in the same basis; ``None`` in
        different ones, where they are not comparable.
        """
        if not isinstance(other, EigenBlock) or not (bases.same(self.ua, other.ua) and bases.same(self.ug, other.ug)):
            return None
        return EigenBlock(self.ua, self.ug, mine * self.d + theirs * other.d, self.sa, self.sg, self.dropped)

    def inverse(self, damping: Damping) -> EigenBlock:
        if isinstance(damping, FactoredTikhonov):
            values = self.d + self.additive(damping.value)
            return EigenBlock(
                self.ua, self.ug, reciprocal(values, FactoredTikhonov(0.0), "the matrix in its eigenbasis")
            )
        return EigenBlock(self.ua, self.ug, reciprocal(self.d, damping, "the matrix in its eigenbasis"))

    def additive(self, x: float | Tensor) -> Tensor | float:
        """``x + sqrt(x) s_A + sqrt(x) s_B``; plain ``x`` where there are no factors or one is trivial."""
        if self.sa is None or self.sg is None or self.sg.shape[-1] == 1:
            return x
        return x + x**0.5 * (self.sa.unsqueeze(-2) + self.sg.unsqueeze(-1))

    def eigh(self) -> tuple[Tensor, BlockBasis]:
        return self.d, self.basis

    def spectrum(self) -> tuple[Tensor, Remake]:
        return self.d, lambda f: EigenBlock(self.ua, self.ug, f)
