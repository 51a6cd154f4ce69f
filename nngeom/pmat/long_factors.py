"""Factors above a side limit: their diagonal is kept, diagonal blocks, or leading eigenvectors and a diagonal.

Diagonal blocks are groups, see :mod:`nngeom.pmat.in_groups`. Leading eigenvectors come from products with test vectors,
see :mod:`nngeom.core.sketch`. What is lost is told by :mod:`nngeom.pmat.dropped`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nngeom.core.errors import ArgumentError, StructureError
from nngeom.core.factored import FactoredJacobian
from nngeom.core.head import HeadJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.tied import TiedJacobian
from nngeom.pmat.in_groups import groups_of, in_groups

FACTOR_LIMIT = 10_000  # a factor with a longer side is cut
FORMS = ("diagonal", "block", "low_rank")
Form = str | tuple[str, int]
LEAST = 8  # the part of the limit below which sides of diagonal blocks are too short


@dataclass(frozen=True)
class Cut:
    """The ``limit`` of the sides of factors, the ``form`` in which longer ones are kept, the ``rank`` of a low one."""

    limit: int = FACTOR_LIMIT
    form: str = "diagonal"
    rank: int | None = None

    @staticmethod
    def of(limit: int, form: Form) -> Cut:
        """Raises :class:`ArgumentError` for a limit below 1, an unknown form, or a rank that is none."""
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ArgumentError(f"factor_limit is {limit!r}; expected the longest side of a dense factor, 1 or more")
        name, rank = form if isinstance(form, tuple) and len(form) == 2 else (form, None)
        ranked = rank is None or (name == "low_rank" and type(rank) is int and rank > 0)
        if not isinstance(name, str) or name not in FORMS or not ranked:
            raise ArgumentError(f"factor_form is {form!r}; expected one of {list(FORMS)}, or ('low_rank', rank)")
        return Cut(limit, name, rank)

    def vectors(self, side: int) -> int:
        """How many leading eigenvectors of a long factor are kept: by default those that take as much memory as the
        largest dense factor.
        """
        if self.form != "low_rank" or side <= self.limit:
            return 0
        return max(0, min(self.rank or max(1, self.limit**2 // side), side - 2))

    def parts(self, layout: Layout, j: LayerJacobian) -> tuple[Layout, ...]:
        """Where the blocks of the rows ``j`` of a ``layout`` lie; raises :class:`StructureError` where sides do not
        fall into blocks.
        """
        _, _, s, o, i = j.shape
        if self.form != "block" or type(j) not in (FactoredJacobian, HeadJacobian) or s != 1 or max(o, i) <= self.limit:
            return (layout,)
        outputs = self._groups(o, "outputs")
        if i <= self.limit:
            return (in_groups(layout, outputs),)
        groups = [(piece, self._groups(piece.arrangement.sizes[2], "inputs")) for piece in layout.pieces]
        return tuple(in_groups(Layout((piece,)), outputs, inputs) for piece, inputs in groups)

    def _groups(self, side: int, what: str) -> int:
        """Into how many groups of equal size the rows of a factor fall."""
        if side <= self.limit:
            return 1
        found = next(b for b in range(-(-side // self.limit), side + 1) if side % b == 0)
        if side // found < max(2, self.limit // LEAST):
            raise StructureError(
                f"{side} {what} do not fall into blocks of equal sides near to factor_limit={self.limit}; "
                "raise factor_limit, or use factor_form='diagonal'"
            )
        return found

    def notes(self, layout: Layout, j: LayerJacobian | None) -> tuple[str, ...]:
        """Which factors of the rows ``j`` are not kept whole."""
        terms = [term for _, term in j.terms] if isinstance(j, TiedJacobian) else [j]
        found = []
        for term in (term for term in terms if term is not None and long_sides(term, self.limit)):
            groups = [groups_of(part, term.shape[3]) for part in self.parts(layout, term)]
            sides = (("A", term.shape[-1], sum(c for _, c in groups)), ("G", term.shape[-2], groups[0][0]))
            for factor, side, blocks in (x for x in sides if x[0].lower() in long_sides(term, self.limit)):
                rank = self.vectors(side)
                kept = "its diagonal" if blocks == 1 else f"{blocks} diagonal blocks"
                kept = f"{rank} leading eigenvectors and a diagonal" if rank else kept
                above = f"above factor_limit={self.limit}"
                found.append(f"of the factor {factor} ({side}) of {layout.names[0]} {kept} is kept: {above}")
        return tuple(found)

    def held(self, j: LayerJacobian, shapes: tuple[tuple[int, ...], ...]) -> int | None:
        """How many numbers the eigenvalues and eigenvectors of factors ``a``, ``g`` of these ``shapes`` are; ``None``
        where neither is of low rank.
        """
        ranks = [self.vectors(p[1]) if side in long_sides(j, self.limit) else 0 for side, p in zip("ag", shapes)]
        if not any(ranks):
            return None
        return sum(spectrum_entries(shape) + shape[0] * r * (shape[1] + 2 * r) for shape, r in zip(shapes, ranks))


def spectrum_entries(shape: tuple[int, ...]) -> int:
    """How many numbers the eigenvalues and eigenvectors of a factor of this ``shape`` are, dense or diagonal."""
    return math.prod(shape) * (len(shape) == 3) + math.prod(shape[:2])


def long_sides(j: LayerJacobian, limit: int) -> set[str]:
    """Which of the factors ``a`` and ``g`` of rows are longer than ``limit``, but for those of lookups."""
    if isinstance(j, TiedJacobian):
        sides = [(transposed, long_sides(term, limit)) for transposed, term in j.terms]
        return {"ag"[(side == "g") ^ transposed] for transposed, found in sides for side in found}
    if type(j) not in (FactoredJacobian, HeadJacobian):
        return set()
    return {side for side, p in (("a", j.shape[4]), ("g", j.shape[3])) if p > limit}
