"""Other views of the same entries."""

from __future__ import annotations

import math
from typing import Any

from nngeom.pullback.axes import ExampleAxis
from nngeom.pullback.safe.rule import ASK, Place, Sizes, from_front, kept, safe


@safe("View UnsafeView ReshapeAlias Unsqueeze Squeeze")
def _viewed(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """The same order: the examples stay ``n`` equal runs inside ``before`` blocks."""
    before, capture = math.prod(out[: axis.at]) * axis.outer, 1
    if 0 in out or math.prod(out) != math.prod(sizes):
        return ASK
    for dim, size in enumerate(sizes):
        if before % capture == 0 and size % (before // capture * n) == 0:
            return ExampleAxis(dim, before // capture)
        capture *= size
    return ASK


@safe("Permute")
def _permuted(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    return kept(from_front(node._saved_dims, len(sizes))[axis.at], axis, out, sizes)


@safe("T Transpose")
def _transposed(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    a, b = from_front((getattr(node, "_saved_dim0", 0), getattr(node, "_saved_dim1", 1)), len(sizes))
    return kept({a: b, b: a}.get(axis.at, axis.at), axis, out, sizes)


@safe("Select Unbind")
def _selected(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """One entry of an axis, or each: the output lacks it."""
    (dim,) = from_front((node._saved_dim,), len(sizes))
    return kept(axis.at + (axis.at >= dim), axis, out, sizes)


@safe("Stack")
def _stacked(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    (dim,) = from_front((node._saved_dim,), len(out))
    return ASK if axis.at == dim else kept(axis.at - (axis.at > dim), axis, out, sizes)


@safe("ViewAsReal ViewAsComplex")
def _leading(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """A last axis comes or goes."""
    return kept(axis.at, axis, out, sizes)


@safe("Repeat")
def _repeated(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    dim = axis.at - (len(out) - len(sizes))
    if dim < 0 or sizes[dim] == 1:
        return None
    return kept(dim, axis, out, sizes) if node._saved_repeats[axis.at] == 1 else ASK
