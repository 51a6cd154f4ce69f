"""Random cotangents as large as the outputs of a model, and inner products of such, in little time and memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

PIECE = 2**20  # numbers that are widened at once
LONG = 2**12  # numbers of a row above which rows are multiplied one by one, into no memory of their own
SHORT = 2**18  # numbers of which a plain inner product in float32 is right to 1e-6


def factors(size: Sequence[int], generator: torch.Generator, like: Tensor) -> list[Tensor]:
    """A vector for each axis, of random signs and sizes between one and two; their :func:`outer` product has no zero.

    A linear function that vanishes at such a product does so by chance of probability zero, as at one of independent
    numbers, which take as much memory as the outputs and, drawn one by one, longer than a pass through their last
    layer.
    """
    drawn = []
    for axis, n in enumerate(size):
        x = torch.rand(2, n, generator=generator, dtype=torch.float64)
        vector = (1 + x[0]) * torch.where(x[1] < 0.5, -1.0, 1.0)
        drawn.append(vector.to(like).view(*[1] * axis, n, *[1] * (len(size) - axis - 1)))
    return drawn


def outer(vectors: list[Tensor]) -> Tensor:
    """The product of all, an axis each."""
    return functools.reduce(torch.mul, vectors)


def dot(x: Tensor, y: Tensor) -> tuple[float, float]:
    """``<x, y>`` and the sum of the absolute values of its terms, both added up in double precision."""
    total, most = 0.0, 0.0
    for a, b in zip(x.flatten().split(PIECE), y.flatten().split(PIECE)):
        terms = a.double() * b.double()
        total, most = total + float(terms.sum()), most + float(terms.abs().sum())
    return total, most


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """``<x[j], y[j]>`` for every row, ``[b]``: pieces by torch's sums in pairs, their totals in double precision.

    A plain inner product of tens of millions of float32 numbers is off by 1e-3, these sums by 1e-7, and those of long
    rows, which are not multiplied into memory of their own, by 1e-6.
    """
    y = y.to(x.dtype)
    if len(x) == 1 or x.numel() >= LONG * len(x):
        return torch.stack([_inner_product(a, b) for a, b in zip(x, y)])
    rows = zip(*(t.flatten(1).split(max(1, PIECE // len(x)), 1) for t in (x, y)))
    return torch.stack([(a * b).sum(1).double() for a, b in rows]).sum(0)


def _inner_product(x: Tensor, y: Tensor) -> Tensor:
    parts = zip(x.flatten().split(SHORT), y.flatten().split(SHORT))
    return torch.stack([torch.dot(a, b) for a, b in parts] or [x.new_zeros(())]).double().sum()
