"""A matrix of blocks and rows of low rank beside: ``P = B + R^T S R`` by the Woodbury identity, never ``d x d``.

With ``C = S + R B^-1 R^T`` (``S`` is its own inverse) and the damping in ``B``: ``P^-1 = B^-1 - B^-1 R^T C^-1 R B^-1``
and ``det P = det B |det C|``. ``P`` is positive definite where ``B`` is and ``C`` has as many positive eigenvalues as
``S`` (Haynsworth 1968). Of a block with Kronecker eigenvectors the rows are kept as ``R B^-1/2``, else as ``R B^-1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import lapack, memory
from nngeom.core.damping import Damping, Tikhonov
from nngeom.core.errors import SingularError
from nngeom.core.layout import Layout
from nngeom.core.linear import differentiated
from nngeom.core.lu import lu
from nngeom.pmat.block import Block, BlockBasis, EyeBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.eigenvalues import reciprocal, rounding
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.pmat.kronecker_spectrum import in_eigenbasis
from nngeom.pmat.regroup import Rows

PIECE = memory.CACHE_BYTES // 16  # of rows that are turned at once


@dataclass(frozen=True, eq=False)
class Side:
    """The rows ``[m, p]`` of one block: ``R B^-1/2`` in the basis of a ``root`` of its inverse, or without one ``R
    B^-1``.
    """

    rows: Tensor
    root: tuple[Tensor, BlockBasis] | None

    @staticmethod
    def of(block: Block, layout: Layout, r: Tensor, damping: Damping) -> tuple[Side, Tensor]:
        """Of the rows ``r [m, d]``, and ``R B^-1 R^T``."""
        if not is_turned(block) or not isinstance(damping, Tikhonov):
            mine = layout.gather(r)
            solved = block.solve(mine, damping).flatten(1)
            inner = mine.flatten(1) @ solved.T
            return Side(solved, None), (inner + inner.T) / 2
        values, basis = block.eigh()
        scale = reciprocal(values, damping, "a block of the sum").sqrt()
        rows = _turned(layout, r, scale, basis)
        return Side(rows, (scale, basis)), lapack.gram_of_rows(rows)

    def spread(self, along: Tensor, sizes: Sequence[int]) -> Tensor:
        """``B^-1 R^T along``, ``[*b, s, o, i]``."""
        inside = (along @ self.rows).view(*along.shape[:-1], *sizes)
        if self.root is None:
            return inside
        scale, basis = self.root
        return basis.mv(scale * inside)


@dataclass(frozen=True, eq=False)
class Bordered:
    """``P`` by the ``blocks`` of its base and the ``sides`` that the rows have there, and ``C [m, m]``."""

    blocks: dict[Layout, Block]
    rows: Rows
    sides: dict[Layout, Side]
    c: Tensor

    @staticmethod
    def of(blocks: dict[Layout, Block], rows: Rows, damping: Damping) -> Bordered:
        """Raises :class:`SingularError` where ``P`` is not positive definite, or ``B``, its ``blocks`` with
        ``damping``.
        """
        sides, c, errors = dict[Layout, Side](), torch.diag(rows.signs), list[SingularError]()
        for layout, block in blocks.items():
            try:
                sides[layout], inner = Side.of(block, layout, rows.r, damping)
            except SingularError as error:
                errors.append(error)
            else:
                c = c + inner
        if errors:
            raise max(errors, key=lambda e: e.needed or 0.0)
        _require_definite(c.detach(), rows.signs)
        return Bordered(blocks, rows, sides, c)

    def corrected(self, x: Tensor, along: Tensor) -> Tensor:
        """``x - B^-1 R^T C^-1 along``, of ``x [*b, d]`` and ``along [*b, m]``."""
        flat = along.reshape(-1, len(self.c))
        inner = torch.linalg.lu_solve(*lu(self.c, "the rows of a sum"), flat.T).T.view(along.shape)
        change = torch.empty_like(x)
        for layout, side in self.sides.items():
            layout.scatter_(change, side.spread(inner, layout.sizes))
        return x - change

    def solve(self, x: Tensor) -> Tensor:
        """``P^-1 b``, of ``x = B^-1 b [*b, d]``."""
        return self.corrected(x, x @ self.rows.r.T)

    def logdet(self) -> Tensor:
        """``log |det C|``, what is added to that of ``B``."""
        result: Tensor = torch.linalg.slogdet(self.c.double())[1].to(self.c)
        return result

    def draw(self, x: Tensor, noise: Tensor) -> Tensor:
        """Of ``N(0, P^-1)`` from ``x`` of ``N(0, B^-1)`` and white ``noise [*b, m]``, where all signs are positive."""
        return self.corrected(x, x @ self.rows.r.T + noise)


def by_eigenvectors(block: Block) -> Block:
    """A Kronecker product by its eigenvectors, that each of several uses need not find them; others as they are."""
    return block.eigen() if isinstance(block, KroneckerBlock) and not block.is_exact else in_eigenbasis(block)


def is_turned(block: Block) -> bool:
    """Whether rows are turned into the eigenbasis of a block in less time than is solved with."""
    return isinstance(block, (EigenBlock, DiagBlock, EyeBlock))


def _turned(layout: Layout, r: Tensor, scale: Tensor, basis: BlockBasis) -> Tensor:
    """``scale * U^T r`` of the places of a ``layout``, ``[m, p]``."""
    cuts = memory.pieces(len(r), scale.numel() * r.element_size(), most=PIECE)
    if any(differentiated(t) for t in (r, scale, *basis.tensors())):
        return torch.cat([(scale * basis.tmv(layout.gather(r[lo:hi]))).flatten(1) for lo, hi in cuts])
    out = r.new_empty(len(r), *scale.shape)
    for lo, hi in cuts:
        x = r.new_empty(*scale.shape[:2], hi - lo, scale.shape[2]).permute(2, 0, 1, 3)
        layout.gather_into(r[lo:hi], x)
        basis.write_rows(x, scale, out[lo:hi])
    return out.flatten(1)


def _require_definite(c: Tensor, signs: Tensor) -> None:
    if bool((signs > 0).all()) and bool(c.diagonal().sum() * 8 * torch.finfo(c.dtype).eps < 1):
        return  # all eigenvalues are one and more
    values = torch.linalg.eigvalsh(c.double()).to(c)
    positive = int((values > rounding(values)).sum())
    if positive != int((signs > 0).sum()) or bool((values.abs() <= rounding(values)).any()):
        raise SingularError("the sum is singular or indefinite at this damping; use a larger one")
