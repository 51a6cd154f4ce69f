"""Contractions of three tensors and more, two at a time in the order that costs least for their sizes.

No order is the best for all sizes. A product of one vector with rows over many positions meets the inputs first; one
of a hundred vectors the rows, formed once: 3.6 instead of 91 ms with a convolution of 5 x 5 over 784 positions, 32
examples and 10 cotangents, 1.8 instead of 82 ms with one (AMD EPYC, AVX-512, one thread, torch 2.13, November 2026).
Planning (opt_einsum, Smith & Gray 2018) takes longer than a small contraction, so plans are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import opt_einsum
import torch
from torch import Tensor

from nngeom.core import memory

PLANS = 4096  # kept, of about a kilobyte each


@dataclass(frozen=True)
class Plan:
    """Steps ``(places of operands, equation)``, whose result goes behind the operands that are left."""

    steps: tuple[tuple[tuple[int, ...], str], ...]
    largest: int  # entries of the largest tensor between


@functools.lru_cache(PLANS)
def plan(equation: str, *shapes: tuple[int, ...]) -> Plan:
    """The cheapest order, by multiply-adds, for operands of these shapes."""
    _, found = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="optimal")
    steps = tuple((tuple(places), pair) for places, _, pair, *_ in found.contraction_list)
    return Plan(steps, int(found.largest_intermediate))


def contract(equation: str, *operands: Tensor, along: str) -> Tensor:
    """``torch.einsum``, planned, and cut along one letter so that what lies between fits the memory budget."""
    *names, result = equation.replace("->", ",").split(",")
    size = next(x.shape[name.index(along)] for name, x in zip(names, operands) if along in name)
    largest = plan(equation, *(tuple(x.shape) for x in operands)).largest * operands[0].dtype.itemsize
    parts = []
    for lo, hi in memory.pieces(size, largest // max(1, size)) if largest > memory.budget() else ((0, size),):
        parts.append(_run(equation, [_cut(x, name.find(along), lo, hi) for name, x in zip(names, operands)]))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, result.index(along)) if along in result else sum(parts[1:], parts[0])


def _run(equation: str, operands: Sequence[Tensor]) -> Tensor:
    left = list(operands)
    for places, pair in plan(equation, *(tuple(x.shape) for x in operands)).steps:
        left.append(torch.einsum(pair, *[left.pop(j) for j in places]))
    return left[0]


def _cut(x: Tensor, dim: int, lo: int, hi: int) -> Tensor:
    return x if dim < 0 or hi - lo == x.shape[dim] else x.narrow(dim, lo, hi - lo)
