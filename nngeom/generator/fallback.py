"""Exact rows for parameters used in ways no adapter knows: one cotangent and example at a time.

A cotangent that is zero for all but one example pulls back to that example's row, whatever the model does with its
parameters. Slow (one backward pass a row) and always right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nngeom.core import memory
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.linalg import accumulation_dtype
from nngeom.generator.backward import pull_back


def used(outputs: Tensor, parameters: Sequence[Tensor]) -> list[bool]:
    """Which parameters the outputs depend on at all."""
    grads = torch.autograd.grad(outputs, parameters, torch.ones_like(outputs), retain_graph=True, allow_unused=True)
    return [g is not None for g in grads]


def full_jacobians(outputs: Tensor, parameters: Sequence[Tensor], v: Tensor, create_graph: bool = False) -> list[LayerJacobian]:
    """``v [k, n, *out]`` -> the rows ``[k, n, 1, 1, p]`` of each parameter."""
    k, n = v.shape[:2]
    sizes = [p.numel() for p in parameters]
    pieces: list[list[Tensor]] = [[] for _ in parameters]
    each = (sum(sizes) + 4 * math.prod(v.shape[1:])) * v.element_size() * 2
    for lo, hi in memory.pieces(k * n, each):
        index = torch.arange(lo, hi, device=v.device)
        masked = v.new_zeros(hi - lo, *v.shape[1:])
        masked[torch.arange(hi - lo, device=v.device), index % n] = v[index // n, index % n]
        grads = pull_back(outputs, parameters, [p.shape for p in parameters], masked, retain=True, create_graph=create_graph)
        for rows, g in zip(pieces, grads):
            rows.append(g.flatten(1).to(accumulation_dtype(g.dtype)))
    return [FullJacobian(torch.cat(rows).view(k, n, 1, 1, -1)) for rows in pieces]
