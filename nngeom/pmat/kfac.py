"""Kronecker products: one factor of inputs, one of output gradients, a block (Martens & Grosse 2015)."""

from __future__ import annotations

from torch import Tensor

from nngeom.core.errors import ArgumentError, StructureError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.statistic import Named
from nngeom.pmat.factors import factors, is_kronecker, structure_of
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.pmat import PMat
from nngeom.pmat.recipe import Recipe, Selection, Statistic
from nngeom.pmat.sua import has_window, sua_blocks, sua_sums
from nngeom.sweep.sweep import Chunk

FACTOR_LIMIT = 10_000  # a factor with a longer side is kept diagonal


def factor_statistic(sharing: str, block_limit: int, *, sua: bool = False) -> Statistic:
    """``chunk -> {layout: {"a", "g"}}``: Kronecker factors, of inputs and of gradients."""
    if sharing not in ("expand", "reduce"):
        raise ArgumentError(f"sharing is {sharing!r}; expected 'expand' or 'reduce'")

    def statistic(chunk: Chunk) -> Named:
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
    def recipe(
        cls, selection: Selection, *, sharing: str = "expand", sua: bool = False, block_limit: int = 4096
    ) -> Recipe:
        """Factors of the parameters of ``selection``; ``sharing``, ``sua``, ``block_limit``: see the class."""
        return kronecker_blocks((yield factor_statistic(sharing, block_limit, sua=sua)))
