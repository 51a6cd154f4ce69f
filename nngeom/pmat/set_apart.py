"""A matrix near the identity but for a few dimensions, brought nearer by the inverse root of what it is there.

``B = I + U N U^T + E`` with orthonormal columns ``U [d, k]``, ``N = Y diag(n) Y^T``, and ``E`` without a diagonal: ``F
= (I + U N U^T)^-1/2 = I + U Y diag((1 + n)^-1/2 - 1) Y^T U^T`` is known, so ``log det B`` is ``sum log(1 + n)`` and the
log-determinant of ``F B F``, whose trace is ``d`` and that of ``(1 / (1 + N) - 1) U^T E U``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg, memory
from nngeom.pmat.balanced import Balanced
from nngeom.pmat.kronecker import EigenBlock
from nngeom.solve.log_trace import NearIdentity

MOST = 256  # dimensions that are set apart: each is one product
LEAST = 1e-3  # of the eigenvalues of I + N: below, little is known of the whole


@dataclass(frozen=True)
class Few:
    """``U`` and ``N``, where the ``p``-th column of ``U`` lies in the ``p``-th row ``[o, i]`` of a block, as ``rows [o,
    i]`` of unit length.
    """

    rows: Tensor
    n: Tensor  # [o o]

    def coordinates(self, v: Tensor) -> Tensor:
        """``U^T v`` of ``v [*b, d]``, ``[*b, o]``."""
        result: Tensor = (v.unflatten(-1, self.rows.shape) * self.rows).sum(-1)
        return result

    def vectors(self, x: Tensor) -> Tensor:
        """``U x`` of ``x [*b, o]``, ``[*b, d]``."""
        return (x.unsqueeze(-1) * self.rows).flatten(-2)


def without_column(found: Balanced) -> tuple[EigenBlock, Few] | None:
    """The nearby matrix without what the column that is apart has beyond one, and that, relative to it; ``None`` where
    no column is, or too many outputs.
    """
    nearby = found.nearby
    if found.apart is None or nearby.sizes[1] > MOST:
        return None
    column, beyond = found.apart
    o, i = nearby.sizes[1:]
    like = nearby.d
    ug, ua = _dense(nearby.ug, o, like), _dense(nearby.ua, i, like)
    d = like[0] - (ug.square().T @ beyond).unsqueeze(-1) * ua[column].square()
    if not bool((d > 0).all()):
        return None
    rows = ua[column] * d.rsqrt()
    lengths = rows.norm(dim=-1, keepdim=True)
    if not bool((lengths > 0).all()):
        return None
    n = lengths * (ug.T @ (beyond.unsqueeze(-1) * ug)) * lengths.T
    return replace(nearby, d=d.unsqueeze(0)), Few(rows / lengths, n)


def _dense(u: Any, p: int, like: Tensor) -> Tensor:
    return torch.eye(p, dtype=like.dtype, device=like.device) if u is None else u[0]


def set_apart(matrix: NearIdentity, few: Few) -> tuple[NearIdentity, Tensor] | None:
    """``F B F``, and ``sum log(1 + n)``; ``None`` where ``I + N`` is nearly singular, or indefinite."""
    n, y = linalg.eigh((few.n + few.n.T) / 2)
    if not bool((1 + n > LEAST).all()):
        return None
    turn = (y * ((1 + n).rsqrt() - 1)) @ y.T

    def rooted(v: Tensor) -> Tensor:
        return v + few.vectors(few.coordinates(v) @ turn)

    inside = _inside(matrix.product, few) - few.n - torch.eye(len(n), dtype=n.dtype, device=n.device)
    change = ((y * (1 / (1 + n) - 1)) @ y.T * inside.T).sum()
    product = lambda v: rooted(matrix.product(rooted(v)))
    return NearIdentity(product, matrix.d, matrix.first + change, None), torch.log1p(n).sum()


def _inside(product: Callable[[Tensor], Tensor], few: Few) -> Tensor:
    """``U^T B U``."""
    o, d = len(few.rows), few.rows.numel()
    unit = torch.eye(o, dtype=few.n.dtype, device=few.n.device)
    cuts = memory.pieces(o, 4 * d * unit.element_size(), most=memory.CACHE_BYTES)
    return torch.cat([few.coordinates(product(few.vectors(unit[lo:hi]))) for lo, hi in cuts])
