"""Kronecker products beside a diagonal, scaled by rows and columns until that diagonal is near the identity.

With ``S^2 = diag(r) (x) diag(c)``, ``r_o c_i`` the product nearest to the diagonal ``d_oi`` in its logarithms: ``S^-1 M
S^-1`` has scaled Kronecker products, as any scaling by rows and columns leaves them, beside what is nearly the
identity, which is diagonal in every basis. So the eigenvectors of the products are nearly those of the sum; unscaled, a
diagonal of another shape than the identity has none in common with them.

A diagonal of squared gradients is nearly such a product but for the bias, whose input does not vary: :attr:`apart` is
the column that differs most, what it has beyond the product a matrix of rank ``o``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.completed import CompletedBasis
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.pmat.near import along, near_basis, sum_of
from nngeom.pmat.pencil import CongruentBlock
from nngeom.pmat.quasi_diag import ArrowBlock
from nngeom.pmat.turned import turned

Seen = tuple[float, Block | None, Block]  # weight, block in a basis if it has structure there, block
APART = 0.25  # of the squared relative deviations from the nearest product, the part of one column that is apart


@dataclass(frozen=True, eq=False)
class Balanced:
    """``S^-1 (M + x I) S^-1``: what is ``nearby`` in a Kronecker eigenbasis, the terms as ``seen`` from there, and
    ``rows [s, o]`` and ``columns [s, i]`` of ``S^2``; ``apart``: a column, and what its scaled diagonal ``[o]`` is
    beyond one, in the only group.
    """

    nearby: EigenBlock
    seen: list[Seen]
    rows: Tensor
    columns: Tensor
    apart: tuple[int, Tensor] | None

    @property
    def logdet(self) -> Tensor:
        """``log det S^2``."""
        _, o, i = self.nearby.sizes
        return i * self.rows.log().sum() + o * self.columns.log().sum()

    @property
    def inverse(self) -> CongruentBlock:
        """That of a matrix near ``M + x I``."""
        return _congruent(self.nearby, 1 / self.nearby.d, self.rows, self.columns)


def balanced(terms: Sequence[tuple[float, Block]], x: float) -> Balanced | None:
    """Of Kronecker products, or spectra in Kronecker eigenbases, beside a diagonal or arrow, ``x`` added to it;
    ``None`` where there is another term, or the diagonal is none to scale by: a multiple of the identity, or with an
    entry that is not positive.
    """
    products = [(w, part) for w, part in terms if isinstance(part, (KroneckerBlock, EigenBlock))]
    beside = [(w, part) for w, part in terms if isinstance(part, (DiagBlock, ArrowBlock, EyeBlock))]
    if not products or len(products) + len(beside) < len(terms):
        return None
    if all(isinstance(part, EyeBlock) for _, part in beside) or any(_is_completed(part) for _, part in products):
        return None
    d = sum_of(w * part.diag() for w, part in beside) + x
    if not bool((d > 0).all()):
        return None
    rows, columns, column = _nearest_product(d)
    d = d / rows.unsqueeze(-1) / columns.unsqueeze(-2)
    arrows = [w * part.c for w, part in beside if isinstance(part, ArrowBlock)]
    rest = DiagBlock(d) if not arrows else _arrow(d, sum_of(arrows), rows, columns)
    scaled = [(w, _scaled(part, rows, columns)) for w, part in products]
    return _of(scaled, rest, (rows, columns), None if column is None else (column, d[0, :, column] - 1))


def _nearest_product(d: Tensor) -> tuple[Tensor, Tensor, int | None]:
    """``r [s, o]``, ``c [s, i]``, and the column that is left out in finding ``r``, if one is."""
    rows, columns = _means(d.log(), d.log())
    if d.shape[0] > 1 or d.shape[-1] < 3:
        return rows, columns, None
    logs = d[0].log()
    typical = (logs - logs.median(0).values).median(1, keepdim=True).values
    deviation = (logs - typical - (logs - typical).median(0).values).square().sum(0)
    worst = int(deviation.argmax())
    if float(deviation[worst]) <= APART * float(deviation.sum()):
        return rows, columns, None
    others = torch.arange(d.shape[-1], device=d.device) != worst
    return *_means(d.log()[..., others], d.log()), worst


def _means(some: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    rows = some.mean(-1) - some.mean((-1, -2)).unsqueeze(-1)
    return rows.exp(), (logs - rows.unsqueeze(-1)).mean(-2).exp()


def _is_completed(part: KroneckerBlock | EigenBlock) -> bool:
    return isinstance(part, EigenBlock) and any(isinstance(u, CompletedBasis) for u in (part.ua, part.ug))


def _scaled(part: KroneckerBlock | EigenBlock, rows: Tensor, columns: Tensor) -> KroneckerBlock | CongruentBlock:
    if isinstance(part, EigenBlock):
        return _congruent(part, part.d, rows, columns)
    a, g = (
        f / x if linalg.is_diagonal(f) else f * x.rsqrt().unsqueeze(-1) * x.rsqrt().unsqueeze(-2)
        for f, x in ((part.a, columns), (part.g, rows))
    )
    return KroneckerBlock(a, g)


def _congruent(basis: EigenBlock, d: Tensor, rows: Tensor, columns: Tensor) -> CongruentBlock:
    """``S^-1 U diag(d) U^T S^-1`` in a ``basis``."""
    sides: list[Any] = [(basis.ua, columns), (basis.ug, rows)]
    va, vg = (x.rsqrt() if u is None else x.rsqrt().unsqueeze(-1) * u for u, x in sides)
    return CongruentBlock(va, vg, d)


def _arrow(d: Tensor, c: Tensor, rows: Tensor, columns: Tensor) -> ArrowBlock:
    between = (columns[:, :-1] * columns[:, -1:]).sqrt()
    return ArrowBlock(d, c / rows.unsqueeze(-1) / between.unsqueeze(-2))


def _of(
    products: Sequence[tuple[float, KroneckerBlock | CongruentBlock]],
    rest: Block,
    scales: tuple[Tensor, Tensor],
    apart: tuple[int, Tensor] | None,
) -> Balanced | None:
    inside: list[Seen]
    ua: Any
    ug: Any
    w, part = products[0]
    if len(products) == 1 and isinstance(part, KroneckerBlock):
        own = part.eigen()
        ua, ug, inside = own.ua, own.ug, [(w, DiagBlock(own.d), part)]
    else:
        basis = near_basis(products)
        if basis is None:
            return None
        ua, ug = basis
        inside = [(w, turned(part, ua, ug), part) for w, part in products]
    d = sum_of([*(w * along(part, ua, ug) for w, part in products), along(rest, ua, ug)])
    if not bool((d > 0).all()):
        return None
    return Balanced(EigenBlock(ua, ug, d), [*inside, (1.0, turned(rest, ua, ug), rest)], *scales, apart)
