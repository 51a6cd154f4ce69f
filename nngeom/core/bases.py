"""Orthonormal bases of a side of a Kronecker product: dense ``[s, p, p]``, completed, or ``None``, the identity."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nngeom.core import linalg, memory
from nngeom.core.completed import CompletedBasis
from nngeom.core.linalg import Basis


def same(x: Basis | None, y: Basis | None) -> bool:
    """Whether both are one basis."""
    if isinstance(x, CompletedBasis) and isinstance(y, CompletedBasis):
        return torch.equal(x.u, y.u)
    return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y


def squares_times(u: Basis | None, d: Tensor) -> Tensor:
    """``(u * u) d``, ``[s, p, m]``: along the coordinates, of numbers ``d`` along the vectors."""
    if isinstance(u, CompletedBasis):
        return u.squares_times(d)
    return d if u is None else u.square() @ d


def squares_transposed_times(u: Basis | None, d: Tensor) -> Tensor:
    """``(u * u)^T d``, ``[s, p, m]``: along the vectors, of numbers ``d`` along the coordinates."""
    if isinstance(u, CompletedBasis):
        return u.times_squares(d.mT).mT
    return d if u is None else u.square().mT @ d


def diagonal_along(u: Basis | None, factor: Tensor) -> Tensor:
    """``[s, p]``: the diagonal of ``u^T F u`` for a factor, dense or its diagonal."""
    if u is None:
        return linalg.factor_diag(factor)
    if isinstance(u, CompletedBasis):
        rows = (factor.unsqueeze(-1) * q if linalg.is_diagonal(factor) else factor @ q for _, q in u.pieces())
        return torch.cat([(q * x).sum(-2) for (_, q), x in zip(u.pieces(), rows)], -1)
    scaled = factor.unsqueeze(-1) * u if linalg.is_diagonal(factor) else factor @ u
    return (u * scaled).sum(-2)


def overlaps_times(u: Basis | None, own: Basis | None, d: Tensor) -> Tensor:
    """``(u^T own)**2 d``, ``[s, p, m]``: along the vectors ``u``, of numbers ``d`` along vectors ``own``."""
    if own is None:
        return squares_transposed_times(u, d)
    if u is None:
        return squares_times(own, d)
    if isinstance(u, Tensor) and isinstance(own, Tensor):
        return (u.mT @ own).square() @ d
    total = torch.zeros_like(d)
    for some, q in _pieces(own):
        total += linalg.left(u, q, transpose=True).square() @ d[:, some]
    return total


def _pieces(u: Basis) -> Iterator[tuple[slice, Tensor]]:
    if isinstance(u, CompletedBasis):
        yield from u.pieces()
    else:
        for lo, hi in memory.pieces(u.shape[-1], u[..., 0].numel() * u.element_size(), most=8 * memory.CACHE_BYTES):
            yield slice(lo, hi), u[..., lo:hi]


def spanned(u: Basis | None, values: Tensor) -> Tensor:
    """``u diag(values) u^T``, ``[s, p, p]``, or the diagonal ``[s, p]``."""
    if u is None:
        return values
    if isinstance(u, CompletedBasis):
        return linalg.left(u, linalg.left(values, linalg.left(u, _unit(u), transpose=True)))
    return (u * values.unsqueeze(-2)) @ u.mT


def _unit(u: CompletedBasis) -> Tensor:
    s, p, _ = u.shape
    return torch.eye(p, dtype=u.u.dtype, device=u.u.device).expand(s, p, p)
