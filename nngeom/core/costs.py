"""Which way to the same number is taken: every count of operations and every size that was set by measuring.

Wherever positions ``t`` share parameters, a number can be reached by forming the rows ``[o, i]`` first or by
contracting pairs of positions first. Costs are multiply-adds, those of a kind of step weighed by how well it runs.
Letters as in :mod:`nngeom.core.jacobian`; of a product's other side ``l`` cotangent, ``m`` example, ``u`` position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDE = 32
SLICE_BYTES = 3 * 2**21
LEAST_ROWS = 64
NARROW = 32
LOOPED = 16


def products_by_positions(g: Sequence[int], h: Sequence[int], i: int, compared: int, same: bool) -> bool:
    """Whether pairs of positions beat rows in the products of all pairs of examples; the cost of one pair of them.

    ``g [k n t s o]``, ``h [l m u s o]``: sizes of both sides' output gradients; ``compared``: operations to compare two
    inputs; ``same``: of a side with itself, where half of the pairs are enough.
    """
    (k, n, t, _, o), (l, m, u, _, _) = g, h
    half = 0.5 if same else 1.0
    formed = k * max(t, 10) / m + (0 if same else l * max(u, 10) / n)
    by_rows = half * 1.1 * k * l * o * i + 1.5 * o * i * formed
    by_positions = half * (compared * t * u + 1.6 * t * u * l * o + 3.5 * k * l * t * o)
    return by_positions < by_rows


def norms_by_positions(g: Sequence[int], i: int) -> bool:
    """Whether pairs of positions beat rows in the squared norms of rows of output gradients ``g [k n t s o]``."""
    k, _, t, _, o = g
    return t * t * (k * (o + 4) + i) < k * o * i * (t + 4)


def squares_by_positions(g: Sequence[int]) -> bool:
    """Whether pairs of positions, cotangents summed first, beat rows in sums of squares of their entries."""
    k, _, t, s, _ = g
    return s == 1 and t + 1 < 1.5 * k


def block(s: int, o: int, i: int, most: int, across: bool) -> tuple[int, int]:
    """Groups (of one: outputs) and inputs of the blocks, of about ``most`` parameters, that rows are formed in.

    ``across``: whether inputs can be cut. Then a block has those inputs that leave all outputs together, or all, or
    about as many as outputs.
    """
    width = i
    if across and most // o >= NARROW:
        width = most // o
    elif across and i > 2 * math.isqrt(most):
        width = max(1, math.isqrt(most))
    width = -(-i // -(-i // width))
    height = s if s > 1 else o
    return max(1, min(height, most // (width * (o if s > 1 else 1)))), width
