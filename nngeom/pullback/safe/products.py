"""Products of matrices, attention, and decompositions."""

from __future__ import annotations

from typing import Any

from nngeom.pullback.axes import ExampleAxis
from nngeom.pullback.safe.entries import entrywise
from nngeom.pullback.safe.rule import ASK, Place, Sizes, kept, safe


@safe("Mm Addmm Bmm Baddbmm")
def _product(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """``[..., p, q] = [..., p, r] @ [..., r, q]``, a third term added first: rows go with the left side, columns with
    the right.
    """
    added = len(node.next_functions) == 3
    if added and number == 0:
        return entrywise(node, number, axis, out, sizes, n)
    left = number == int(added)
    if axis.at < len(out) - 2:
        return kept(axis.at, axis, out, sizes)
    rows = axis.at == len(out) - 2
    return kept(axis.at, axis, out, sizes) if rows == left else None


@safe("Mv")
def _matrix_vector(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    return kept(0, axis, out, sizes) if number == 0 else None


@safe("Linear MkldnnLinear")
def _linear(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """The last axis of the input is contracted."""
    if axis.at == len(out) - 1:
        return ASK
    return kept(axis.at, axis, out, sizes) if number == 0 else None


@safe("Cdist EuclideanDist")
def _distances(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """``[..., p, r]`` between ``[..., p, q]`` and ``[..., r, q]``."""
    if axis.at < len(out) - 2:
        return kept(axis.at, axis, out, sizes) if len(sizes) == len(out) else ASK
    mine = (axis.at == len(out) - 2) == (number == 0)
    return kept(len(sizes) - 2, axis, out, sizes) if mine else None


@safe(
    "ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention ScaledDotProductEfficientAttention "
    "ScaledDotProductCudnnAttention ScaledDotProductFusedAttentionOverrideable"
)
def _attention(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Queries, keys, values ``[b, h, t, q]`` and a mask: examples on either of the first two axes."""
    if axis.at > 1 or len(out) != 4:
        return ASK
    return entrywise(node, number, axis, out, sizes, n) if number > 2 else kept(axis.at, axis, out, sizes)


@safe(
    "LinalgInvEx LinalgCholeskyEx LinalgSolveEx LinalgSolveTriangular LinalgDet LinalgSlogdet LinalgEigh LinalgSvd "
    "LinalgQr LinalgMatrixExp CholeskySolve"
)
def _matrices(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Each of a batch of matrices by itself."""
    return kept(axis.at, axis, out, sizes) if axis.at < len(sizes) - 2 and len(out) >= len(sizes) - 2 else ASK
