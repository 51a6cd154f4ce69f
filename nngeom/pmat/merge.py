"""The matrix of several data sets together, from the matrix of each."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TypeVar

from nngeom.core.errors import ArgumentError, ArgumentTypeError, StructureError
from nngeom.core.layout import Layout
from nngeom.pmat.block import Block
from nngeom.pmat.merged_dropped import with_dropped
from nngeom.pmat.pmat import PMat

M = TypeVar("M", bound=PMat)


def merge(*matrices: M, weights: Sequence[float] | None = None) -> M:
    """The matrix of several data sets together, from ``matrices``, one of each, weighted by their examples.

    ``weights`` count in place of the examples, one a matrix, of any sum above zero: a weight below the others forgets.
    Exact for Dense, Diag, BlockDiag, QuasiDiag, LowRank, Eye, and for KFAC, whose factors are averaged; of those with
    ``factor_form="low_rank"`` leading eigenvectors of the mean are kept, the exact trace. What ``dropped`` says of
    factors above ``factor_limit`` is added up: no more is lost of their mean. The eigenvalues of EKFACs only mean the
    same in equal bases. Raises :class:`StructureError` where the bases or the blocks differ, :class:`CollectionError`
    for other parameters, :class:`ArgumentError` for weights that are negative, all zero or not as many.
    """
    first, *others = _checked(matrices)
    shares = _shares(matrices, weights)
    blocks, done = dict(first.blocks), shares[0]
    for other, share in zip(others, shares[1:]):
        whole = done + share
        mine, theirs = (done / whole, share / whole) if whole > 0 else (1.0, 0.0)
        both = {lay: _merged(lay, block, other.blocks[lay], mine, theirs) for lay, block in blocks.items()}
        blocks, done = with_dropped(blocks, other.blocks, both, mine, theirs), whole
    return first.of_blocks(first.layer_collection, blocks, sum(m.examples for m in matrices))


def _merged(layout: Layout, x: Block, y: Block, mine: float, theirs: float) -> Block:
    both = x.merged(y, mine, theirs)
    if both is None:
        raise StructureError(
            f"cannot merge the blocks of {list(layout.names)[:4]}: {type(x).__name__} and {type(y).__name__} have no "
            "common mean (eigenvalues in different bases are not comparable); measure both with M.rescaled in one "
            "basis, or on all data at once"
        )
    return both


def _checked(matrices: tuple[M, ...]) -> tuple[M, ...]:
    """Matrices of one representation over the same parameters."""
    if not matrices:
        raise ArgumentError("merge got no matrix; expected measured matrices of one representation, merge(a, b, ...)")
    for m in matrices:
        if not isinstance(m, PMat):
            raise ArgumentTypeError(
                f"cannot merge {type(m).__name__}; expected measured matrices of one representation, each an argument "
                "of its own (not implicit, no sums)"
            )
    first = matrices[0]
    for other in matrices[1:]:
        first.layer_collection.require(other.layer_collection, "another matrix")
        if type(first) is not type(other) or first.blocks.keys() != other.blocks.keys():
            one, two = type(first).__name__, type(other).__name__
            differ = f"{one} and {two}" if one != two else f"two {one} with different blocks"
            raise StructureError(
                f"cannot merge {differ}; expected the same representation of the same model, with the same options"
            )
    return matrices


def _shares(matrices: Sequence[PMat], weights: Sequence[float] | None) -> list[float]:
    """The weight of each, by default its number of examples."""
    if weights is None:
        counts = [m.examples for m in matrices]
        if min(counts) < 1:
            raise ArgumentError(
                f"cannot merge matrices of {' and '.join(map(str, counts))} examples; expected measured ones, with at "
                "least one example each, or weights="
            )
        return [float(n) for n in counts]
    given = list(weights) if isinstance(weights, Sequence) else [None]
    if not all(isinstance(w, numbers.Real) for w in given):
        raise ArgumentTypeError(f"weights is {weights!r}; expected a list of numbers, one for each matrix")
    if len(given) != len(matrices):
        raise ArgumentError(f"there are {len(given)} weights for {len(matrices)} matrices; expected one for each")
    shares = [float(w) for w in given]
    if not all(math.isfinite(w) and w >= 0 for w in shares) or not sum(shares) > 0:
        raise ArgumentError(f"weights is {weights!r}; expected finite numbers >= 0, not all of them 0")
    return shares
