"""A matrix of blocks and rows of low rank beside: ``P = B + R^T S R`` by the Woodbury identity, never ``d x d``.

With ``C = S + R B^-1 R^T`` (``S`` is its own inverse) and the damping in ``B``: ``P^-1 = B^-1 - B^-1 R^T C^-1 R B^-1``
and ``det P = det B |det C|``. ``P`` is positive definite where ``B`` is and ``C`` has as many positive eigenvalues as
``S`` (Haynsworth 1968). Of a block with Kronecker eigenvectors ``C`` has the products of the rows ``R B^-1/2`` in that
basis, else those of ``R`` and ``R B^-1``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import lapack
from nngeom.core.damping import Damping, Tikhonov
from nngeom.core.errors import SingularError
from nngeom.core.layout import Layout
from nngeom.core.linear import differentiated
from nngeom.core.lu import lu
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.eigenvalues import reciprocal, rounding
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.pmat.kronecker_spectrum import in_eigenbasis
from nngeom.pmat.regroup import Rows


@dataclass(frozen=True, eq=False)
class Bordered:
    """``P`` by the ``blocks`` of its base and the ``rows`` beside, both with a ``damping``, and ``C [m, m]``."""

    blocks: dict[Layout, Block]
    rows: Rows
    damping: Damping
    c: Tensor

    @staticmethod
    def of(blocks: dict[Layout, Block], rows: Rows, damping: Damping) -> Bordered:
        """Raises :class:`SingularError` where ``P`` is not positive definite, or ``B``, its ``blocks`` with
        ``damping``.
        """
        c, turned, errors = torch.diag(rows.signs), list[Iterator[Tensor]](), list[SingularError]()
        for layout, block in blocks.items():
            try:
                inner = _inner(block, layout, rows.r, damping)
            except SingularError as error:
                errors.append(error)
            else:
                if isinstance(inner, Tensor):
                    c = c + inner
                else:
                    turned.append(inner)
        if errors:
            raise max(errors, key=lambda e: e.needed or 0.0)
        if turned:
            half = lapack.half_gram(rows.r, itertools.chain(*turned))
            c = c + half.triu() + half.triu(1).T
        _require_definite(c.detach(), rows.signs)
        return Bordered(blocks, rows, damping, c)

    def corrected(self, x: Tensor, along: Tensor) -> Tensor:
        """``x - B^-1 R^T C^-1 along``, of ``x [*b, d]`` and ``along [*b, m]``."""
        flat = along.reshape(-1, len(self.c))
        inner = torch.linalg.lu_solve(*lu(self.c, "the rows of a sum"), flat.T).T.view(along.shape)
        back, change = inner @ self.rows.r, torch.empty_like(x)
        for layout, block in self.blocks.items():
            layout.scatter_(change, block.solve(layout.gather(back), self.damping))
        return x - change

    def solve(self, x: Tensor) -> Tensor:
        """``P^-1 b``, of ``x = B^-1 b [*b, d]``."""
        return self.corrected(x, x @ self.rows.r.T)

    def logdet(self) -> Tensor:
        """``log |det C|``, what is added to that of ``B``."""
        wide = self.c.double()
        factor, failed = torch.linalg.cholesky_ex(wide)
        found: Tensor = torch.linalg.slogdet(wide)[1] if bool(failed) else 2 * factor.diagonal().log().sum()
        return found.to(self.c)

    def draw(self, x: Tensor, noise: Tensor) -> Tensor:
        """Of ``N(0, P^-1)`` from ``x`` of ``N(0, B^-1)`` and white ``noise [*b, m]``, where all signs are positive."""
        return self.corrected(x, x @ self.rows.r.T + noise)


def by_eigenvectors(block: Block) -> Block:
    """A Kronecker product by its eigenvectors, that each of several uses need not find them; others as they are."""
    return block.eigen() if isinstance(block, KroneckerBlock) and not block.is_exact else in_eigenbasis(block)


def is_turned(block: Block) -> bool:
    """Whether rows are turned into the eigenbasis of a block in less time than is solved with."""
    return isinstance(block, (EigenBlock, DiagBlock, EyeBlock))


def _inner(block: Block, layout: Layout, r: Tensor, damping: Damping) -> Tensor | Iterator[Tensor]:
    """``R B^-1 R^T`` of a block and the rows ``r [m, d]``, or columns whose products it is, without a graph."""
    if not is_turned(block) or not isinstance(damping, Tikhonov):
        mine = layout.gather(r)
        inner = mine.flatten(1) @ block.solve(mine, damping).flatten(1).T
        return (inner + inner.T) / 2
    values, basis = block.eigh()
    scale = reciprocal(values, damping, "a block of the sum").sqrt()
    if any(differentiated(t) for t in (r, scale, *basis.tensors())):
        rows = (scale * basis.tmv(layout.gather(r))).flatten(1)
        return rows @ rows.T
    return basis.columns_of(r.detach(), layout, scale.detach())


def _require_definite(c: Tensor, signs: Tensor) -> None:
    if bool((signs > 0).all()) and bool(c.diagonal().sum() * 8 * torch.finfo(c.dtype).eps < 1):
        return  # all eigenvalues are one and more
    values = torch.linalg.eigvalsh(c.double()).to(c)
    positive = int((values > rounding(values)).sum())
    if positive != int((signs > 0).sum()) or bool((values.abs() <= rounding(values)).any()):
        raise SingularError("the sum is singular or indefinite at this damping; use a larger one")
