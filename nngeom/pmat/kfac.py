"""Kronecker products: one factor of inputs, one of output gradients, a block (Martens & Grosse 2015)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nngeom.core.errors import ArgumentError, StructureError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.pmat.factors import factors, is_kronecker, structure_of
from nngeom.pmat.given import require_collection, require_count
from nngeom.pmat.given_factors import blocks_of, factors_of
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Selection
from nngeom.pmat.sua import has_window, sua_blocks, sua_sums
from nngeom.space.collection import LayerCollection

FACTOR_LIMIT = 10_000  # a factor with a longer side is kept diagonal


def factor_statistic(sharing: str, block_limit: int, sua: bool = False):
    """``chunk -> {layout: {"a", "g"}}``: Kronecker factors, of inputs and of gradients."""
    if sharing not in ("expand", "reduce"):
        raise ArgumentError(f"sharing is {sharing!r}; expected 'expand' or 'reduce'")

    def statistic(chunk):
        named = {}
        for layout, j in chunk.jacobians.items():
            require_room(j, layout.names, block_limit)
            if sua and has_window(layout, j):
                named[layout] = sua_sums(layout, j, sharing, FACTOR_LIMIT)
            else:
                named[layout] = factors(j, sharing, FACTOR_LIMIT)
        return named

    return statistic


def require_room(j: LayerJacobian, names: tuple[str, ...], block_limit: int) -> None:
    """Raise :class:`StructureError` for a parameter without Kronecker structure whose exact block is above the
    limit.
    """
    i = j.shape[-1]
    if i > block_limit and not is_kronecker(structure_of(j)):
        raise StructureError(
            f"parameter {' and '.join(map(repr, names))} has no Kronecker structure and {i} entries; its exact "
            f"block of {i}**2 numbers is above "
            f"block_limit={block_limit}: raise block_limit, leave it out with LayerCollection.from_model(model, "
            "exclude=...), or give it "
            f"another representation, PMatMixed({{{names[0]!r}: PMatDiag}}, default=PMatKFAC)"
        )


def kronecker_block(means: dict[str, Tensor]) -> KroneckerBlock:
    """From the means of :func:`factor_statistic`: a missing gradient factor is trivial, unlike uses are joined."""
    if "a0" in means:
        return KroneckerBlock.of(*(means[f"{side}{q}"] for q in range(len(means) // 2) for side in "ag"))
    a = means["a"]
    return KroneckerBlock(a, means["g"] if "g" in means else a.new_ones(a.shape[0], 1, 1))


def kronecker_blocks(means: dict[Layout, dict[str, Tensor]]) -> dict[Layout, KroneckerBlock]:
    """Every block; a layer whose places are taken to be uncorrelated has one for its weight and one for its bias."""
    blocks: dict[Layout, KroneckerBlock] = {}
    for layout, t in means.items():
        blocks |= sua_blocks(layout, t) if "c" in t else {layout: kronecker_block(t)}
    return blocks


class PMatKFAC(PMat):
    """A Kronecker product a layer. ``sharing``: positions as independent (``"expand"``) or averaged first
    (``"reduce"``).

    ``sua``: the places of a window as uncorrelated, one factor of channels for all of them; the bias then is a block of
    its own. ``block_limit``: a parameter without Kronecker structure keeps its exact dense block up to so many entries,
    and above raises :class:`StructureError`.
    """

    centred = False

    @classmethod
    def recipe(cls, selection: Selection, sharing: str = "expand", sua: bool = False, block_limit: int = 4096):
        """Factors of the parameters of ``selection``; ``sharing``, ``sua``, ``block_limit``: see the class."""
        return kronecker_blocks((yield factor_statistic(sharing, block_limit, sua)))

    @classmethod
    def from_factors(cls, lc: LayerCollection, factors: Mapping[Any, tuple[Tensor, Tensor]], examples: int = 1) -> PMat:
        """The Kronecker products of ``factors``, ``{layer: (A, G)}``, of all layers of ``lc``; copies.

        ``A (i, i)`` is over the inputs, ``(i + 1, i + 1)`` with the bias last, ``G (o, o)`` over the outputs: entry
        ``[o, i], [p, j]`` of the block is ``G[o, p] A[i, j]``. A factor may be its diagonal, ``(i,)``; factors of a
        layer with groups have these as a leading axis, ``(s, i, i)`` and ``(s, o, o)``. A weight is output-major where
        the sizes allow it, else input-major; with a diagonal ``A`` the other way round, as a table. In place of a layer
        stand a parameter or a tuple (weight, bias) where it has several blocks.

        ``examples``: how many they are means over, for :func:`nngeom.merge`. Raises :class:`CollectionError` for a
        missing or foreign layer, :class:`ArgumentError` for another shape or an asymmetric factor.
        """
        return cls.of_blocks(lc, dict(blocks_of(require_collection(lc), factors)), require_count(examples))

    def factors(self) -> dict[Any, tuple[Tensor, Tensor]]:
        """``{layer: (A, G)}``, copies, as :meth:`from_factors` takes them: of these it makes this matrix again.

        A parameter without Kronecker structure has its exact block as ``A``, and ``G`` is ``1``. Raises
        :class:`StructureError` for a block whose place in the parameters the sizes of its factors do not tell: of an
        einsum, of a window with ``sua=True``, of a square table or transposed kernel with a dense ``A``.
        """
        return factors_of(self.layer_collection, self.blocks)
