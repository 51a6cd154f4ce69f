"""A sum of blocks of unlike kinds over one layout, which is no block of a kind that is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core.damping import Cutoff, Damping, Tikhonov
from nngeom.core.errors import ConvergenceError, SingularError, SizeError
from nngeom.core.linear import differentiated, identity, solution
from nngeom.pmat.arrow_root import split_arrow
from nngeom.pmat.balanced import balanced
from nngeom.pmat.block import Block, BlockBasis, EyeBlock
from nngeom.pmat.block_algebra import Remake
from nngeom.pmat.closed import Weighted, reduced
from nngeom.pmat.commuting import commuting
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.eigenvalues import by_eigenvalues, rounding
from nngeom.pmat.group import GroupBlock, by_group, coarser, groups
from nngeom.pmat.inner import squared_norm
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.near import near, sum_of
from nngeom.pmat.pencil import Pencil, pencil
from nngeom.solve.cg import refined
from nngeom.solve.iterative import iterative
from nngeom.solve.norm import spectral_norm

BLOCK_LIMIT = 10_000  # a block with a longer side is not made dense
ITERATED = 384  # a block with a longer side is solved with by iteration, which then is faster
INSTEAD = {  # what takes products alone
    "the log-determinant": '; logdet(x, estimator="slq") estimates it',
    "the spectrum": "; lanczos(k) has the eigenvalues at its ends",
}


@dataclass(frozen=True, eq=False)
class SumBlock(Block):
    """``sum_j weight_j M_j``; made dense, in groups where all parts fall apart into them, up to a side of ``limit``."""

    parts: tuple[Block, ...]
    weights: tuple[float | Tensor, ...]
    limit: int = BLOCK_LIMIT
    tol: float | None = None
    max_steps: int | None = None

    @staticmethod
    def of(terms: Sequence[Weighted], *options: Any) -> Block:
        """The sum of ``terms``, in closed form where it has one."""
        few = reduced(terms)
        if len(few) == 1:
            return few[0][1] if isinstance(few[0][0], float) and few[0][0] == 1 else few[0][1].scaled(few[0][0])
        weights, parts = zip(*few)
        return SumBlock(parts, weights, *options)

    def together(self) -> Block:
        """In the eigenbasis of all parts, where they commute."""
        return commuting(self.terms) or self

    @property
    def terms(self) -> list[Weighted]:
        """Weights and parts."""
        return list(zip(self.weights, self.parts))

    def tensors(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield from part.tensors()
        yield from (w for w in self.weights if isinstance(w, Tensor))

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> Self:
        weights = tuple(f(w) if isinstance(w, Tensor) else w for w in self.weights)
        return replace(self, parts=tuple(p.map_tensors(f) for p in self.parts), weights=weights)

    @property
    def sizes(self) -> torch.Size:
        return self.parts[0].sizes

    def mv(self, x: Tensor) -> Tensor:
        return sum_of(w * part.mv(x) for w, part in self.terms)

    def diag(self) -> Tensor:
        return sum_of(w * part.diag() for w, part in self.terms)

    def trace(self) -> Tensor:
        return sum_of(w * part.trace() for w, part in self.terms)

    def squared_norm(self) -> Tensor:
        return squared_norm(self)

    def scaled(self, c: float | Tensor) -> SumBlock:
        return replace(self, weights=tuple(c * w for w in self.weights))

    @property
    def side(self) -> int:
        """The side of the dense blocks that the sum falls apart into."""
        return self.sizes.numel() // min(map(groups, self.parts))

    def grouped(self, what: str) -> GroupBlock:
        """Made dense; raises :class:`SizeError` above the limit."""
        if self.side > self.limit:
            instead = INSTEAD.get(what, "")
            kinds = ", ".join(sorted({type(part).__name__.removesuffix("Block") for part in self.parts}))
            raise SizeError(
                f"{what} of a sum of {len(self.parts)} unlike matrices ({kinds}) needs a dense block of side "
                f"{self.side}; the limit is {self.limit}: pass limit={self.side} to have it anyway, or make one matrix "
                f"of them first, with nng.merge of one representation, or of PMatDiag or PMatEKFAC in one basis"
                f"{instead}"
            )
        few = min(map(groups, self.parts))
        return GroupBlock(sum_of(w * coarser(by_group(part), few) for w, part in self.terms), *self.sizes)

    def pencil(self, damping: Damping) -> Pencil | None:
        """Of two Kronecker products, one of them definite, without damping."""
        if len(self.parts) != 2 or not all(isinstance(part, KroneckerBlock) for part in self.parts):
            return None
        if isinstance(damping, Cutoff) or isinstance(damping.value, Tensor) or damping.value:
            return None
        return pencil(*(part.scaled(w) for w, part in self.terms))  # type: ignore[arg-type]

    def plus_diagonal(self, d: Tensor) -> Block:
        return SumBlock.of([*self.terms, (1.0, DiagBlock(d))], self.limit, self.tol, self.max_steps)

    def spectrum(self) -> tuple[Tensor, Remake]:
        return self.grouped("a function").spectrum()

    def spectral_norm(self) -> Tensor:
        """Of the dense block where it is small, above by Lanczos' method."""
        if self.side <= min(ITERATED, self.limit) or self._has_graph():
            return self.grouped("the norm").spectral_norm()
        return spectral_norm(_flat(self.mv, self.sizes), None, self.diag().flatten())

    def inverse(self, damping: Damping) -> Block:
        found = self.pencil(damping)
        return self.grouped("the inverse").inverse(damping) if found is None else found.inverse

    def eigh(self) -> tuple[Tensor, BlockBasis]:
        return self.grouped("the spectrum").eigh()

    def logdet(self, damping: Tikhonov) -> Tensor:
        found = self.pencil(damping)
        return self.grouped("the log-determinant").logdet(damping) if found is None else found.logdet

    def root_times(self, noise: Tensor, damping: Tikhonov) -> Tensor:
        found = self.pencil(damping)
        return self.grouped("a draw").root_times(noise, damping) if found is None else found.root_times(noise)

    def solve(self, b: Tensor, damping: Damping) -> Tensor:
        """Of the dense block where it is small, above by conjugate gradients."""
        if isinstance(damping, Cutoff) or (self.side <= min(ITERATED, self.limit) or self._has_graph()):
            return self.grouped("a solve with Cutoff, or of a matrix with a graph,").solve(b, damping)
        if by_eigenvalues(damping):  # indefinite
            return (self.iterate if self.side > self.limit else self.grouped("a solve").solve)(b, damping)
        found = self.pencil(damping)
        nearby = None if found is None else found.inverse
        if self.side > self.limit:
            return self.iterate(b, damping, nearby)
        if nearby is not None or self.is_positive(damping):
            try:
                return self.iterate(b, damping, nearby)
            except (ConvergenceError, SingularError):  # too little damping
                pass
        return self.grouped("a solve").solve(b, damping)

    def _has_graph(self) -> bool:
        return any(differentiated(t) for part in self.parts if not isinstance(part, EyeBlock) for t in part.tensors())

    def spectra(self, terms: Sequence[Weighted] | None = None) -> list[tuple[Tensor, BlockBasis, float]]:
        """Weighted eigenvalues of every part, or of some ``terms``, their basis, and how far the least of them is below
        zero.
        """
        found = []
        for w, part in self.terms if terms is None else terms:
            values, basis = part.eigh()
            values = number(w) * values
            known = values.detach()
            least = float(known.min()) if known.numel() else 0.0
            found.append((values, basis, least if least < -float(rounding(known)) else 0.0))
        return found

    def is_positive(self, damping: Damping) -> bool:
        """Whether the least eigenvalues of the parts prove that the damped sum is positive (Weyl's inequality)."""
        split = split_arrow(self.terms, damping.value)
        if split is not None and not any(below for _, _, below in self.spectra(split[1])):
            return True
        least = sum(below for _, _, below in self.spectra())
        return least == 0 or least + number(damping.value) > 0

    def iterate(self, b: Tensor, damping: Damping, nearby: Block | None = None) -> Tensor:
        """``(M + damping I)^-1 b`` to a relative residual ``tol``, preconditioned by an inverse ``nearby``, that of a
        matrix :func:`near` this one where none is given; an indefinite one by MINRES.
        """
        tol = max(1e-10, 64 * torch.finfo(b.dtype).eps) if self.tol is None else self.tol
        shape = b.shape[-3:]
        maps = [
            (w * part.c, identity) if isinstance(part, EyeBlock) else (w, _flat(part.mv, shape))
            for w, part in self.terms
        ]
        if by_eigenvalues(damping):
            solver = iterative(tol, self.max_steps, indefinite=True)
        else:
            inverse = self._nearby(damping) if nearby is None else nearby
            solver = lambda matrix, x: refined(matrix, x, tol, self.max_steps, _flat(inverse.mv, shape))
        return solution(solver, [*maps, (damping.value, identity)], b.flatten(-3)).view(b.shape)

    def _nearby(self, damping: Damping) -> Block:
        with torch.no_grad():
            terms, x = [(number(w), part) for w, part in self.terms], number(damping.value)
            found = balanced(terms, x)
            return _inverse(near(terms), Tikhonov(x)) if found is None else found.inverse

    def draw(self, noise: Callable[[], Tensor], damping: Tikhonov) -> Tensor:
        """Of ``N(0, (M + damping I)^-1)``, from as many draws of white ``noise`` as are needed.

        Large sums are drawn from by one solve, with a right-hand side of covariance ``M + damping I`` (Papandreou &
        Yuille 2010), of which every part takes as much damping as makes it positive.
        """
        if self.side <= min(ITERATED, self.limit) or self._has_graph():
            return self.root_times(noise(), damping)
        found, split = self.pencil(damping), split_arrow(self.terms, damping.value)
        spectra = self.spectra(None if split is None else split[1])
        if split is not None and any(below for _, _, below in spectra):
            split, spectra = None, self.spectra()
        rest = damping.value + sum(below for _, _, below in spectra)
        if found is not None or rest < 0:
            return self.root_times(noise(), damping)
        total = rest**0.5 * noise() if split is None else split[0].times(noise())
        for values, basis, below in spectra:
            total = total + basis.mv((values - below).clamp_min(0).sqrt() * basis.tmv(noise()))
        return self.solve(total, damping)


def number(c: float | Tensor) -> float:
    """A factor without its graph."""
    return float(c.detach()) if isinstance(c, Tensor) else float(c)


def _inverse(block: Block, damping: Tikhonov) -> Block:
    """The inverse of the part of a preconditioner that has one."""
    values, _ = block.eigh()
    least = torch.finfo(values.dtype).eps * values.abs().max()
    return type(block)(**{**block.fields(), "d": 1 / (values.clamp_min(0) + damping.value).clamp_min(float(least))})


def _flat(f: Callable[[Tensor], Tensor], shape: torch.Size) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x.unflatten(-1, shape)).flatten(-3)
