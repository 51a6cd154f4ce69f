"""Which way to the same number is taken: every count of operations and every size that was set by measuring.

Wherever positions ``t`` share parameters, a number can be reached by forming the rows ``[o, i]`` first or by
contracting pairs of positions first. Costs are multiply-adds, those of a kind of step weighed by how well it runs.
Letters as in :mod:`nngeom.core.jacobian`; of a product's other side ``l`` cotangent, ``m`` example, ``u`` position.

All was measured on 29 November 2026: AMD EPYC (family 25, AVX-512, two shared cores), one thread, torch 2.13.0,
float32; layers of 5 x 5 and 3 x 3 convolutions, linear layers over 2 to 128 positions, lookups of 1000 and 5000 words;
1 to 100 cotangents of 4 to 128 examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDE = 32  # rows of a matrix product from which it runs well alone; at 256 products of 64 rows take twice as long
SLICE_BYTES = 3 * 2**21  # of rows in working memory: a sixth costs 3 to 50 % more, eight times as much gains nothing
LEAST_ROWS = 64  # of a strip of a product: 32 to 128 are alike within the noise, 512 cost 10 % (few strips are skipped)
SHARED_ROWS = 160  # the same on two threads, of 1000 rows over 300: 100 took 1.13 and 1.20 times as long as 200 and 500
SMALL_PRODUCT = 2**16  # entries up to which a symmetric product is one call: half the work is less than another call
NARROW = 32  # columns of a product: without a limit, products over 1153 inputs take 1.5, over 129 3.3 times as long
QUERIES = 48  # with explicit rows from which those of examples are formed: 32 are alike, of 128 it saves half
LOOPED = 16  # outputs from which cotangents one at a time run well: at 4 narrow layers take 1.4, at 128 wide ones 1.4


def products_by_positions(g: Sequence[int], h: Sequence[int], i: int, compared: int, *, same: bool) -> bool:
    """Whether pairs of positions beat rows in the products of all pairs of examples; the cost of one pair of them.

    ``g [k n t s o]``, ``h [l m u s o]``: sizes of both sides' output gradients; ``compared``: operations to compare two
    inputs; ``same``: of a side with itself, where half of the pairs are enough.

    A multiply-add weighs 1.1 in the product of rows, 1.5 in forming them (as many as over 10 positions at least, as
    over 25 in a lookup), 1.6 in products over ``u``, 3.5 in those over ``t`` and ``o``. Of 63 choices 62 were within
    15 % of the better way, the worst took 1.8 times as long (3 x 3 inputs, 16 positions, one cotangent, not in a tile).
    """
    (k, n, t, _, o), (l, m, u, _, _) = g, h
    half = 0.5 if same else 1.0
    steps = (25, 25) if compared == 1 else (max(t, 10), max(u, 10))  # rows of lookups are written, not multiplied
    formed = k * steps[0] / m + (0 if same else l * steps[1] / n)
    by_rows = half * 1.1 * k * l * o * i + 1.5 * o * i * formed
    by_positions = half * (compared * t * u + 1.6 * t * u * l * o + 3.5 * k * l * t * o)
    return by_positions < by_rows


def norms_by_positions(g: Sequence[int], i: int) -> bool:
    """Whether pairs of positions beat rows in the squared norms of rows of output gradients ``g [k n t s o]``.

    A sum costs as much as 4 more positions, or outputs. Of 17 choices all were the better way.
    """
    k, _, t, _, o = g
    return t * t * (k * (o + 4) + i) < k * o * i * (t + 4)


def squares_by_positions(g: Sequence[int], i: int) -> bool:
    """Whether pairs of positions, cotangents summed first, beat rows in sums of squares of their entries.

    Gathering a number for a pair costs as much as 22 multiply-adds, of convolutions, whose positions lie side by side,
    about 50; squaring rows as much as 5 more positions. Of 16 choices 15 were the better way, one took 1.4 times as
    long (16 positions of a linear layer, 10 cotangents; of a convolution it is the better way).
    """
    k, _, t, s, o = g
    pairs = t * (t + 1) / 2 * (o * i + 50 * (k * o + i))
    return s == 1 and pairs < k * (t + 5) * o * i


def block(s: int, o: int, i: int, most: int, *, across: bool) -> tuple[int, int]:
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
