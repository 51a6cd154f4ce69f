"""The spectral norm: of a symmetric operator by Lanczos' method, of a matrix by either way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nngeom.solve.lanczos import lanczos

DECOMPOSED = 512  # the longest side of matrices whose singular values are all taken


def spectral_norm(matrix: Callable[[Tensor], Tensor], start: Tensor | None, like: Tensor) -> Tensor:
    """The largest absolute eigenvalue, from products with the square of a symmetric ``matrix``.

    ``start``: the first vector ``(d,)``; ``None``: always the same random one, of the shape and dtype of ``like``.
    """
    start = _drawn(like) if start is None else start
    return lanczos(lambda x: matrix(matrix(x)), start, 1)[0][0].clamp_min(0).sqrt()


def largest_singular_value(m: Tensor) -> Tensor:
    """Of a matrix, with its gradient in the entries of ``m``; 0 of none."""
    if max(m.shape) <= DECOMPOSED:
        return torch.linalg.matrix_norm(m, 2) if m.numel() else m.sum()
    rows = m.detach()
    v = lanczos(lambda x: rows.T @ (rows @ x), _drawn(rows[0]), 1)[1][0]
    u = rows @ v
    largest: Tensor = (u / u.norm().clamp_min(torch.finfo(m.dtype).tiny)) @ (m @ v)
    return largest


def _drawn(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
