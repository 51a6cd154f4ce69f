"""The spectral norm of a symmetric operator, by Lanczos' method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nngeom.solve.lanczos import lanczos


def spectral_norm(matrix: Callable[[Tensor], Tensor], start: Tensor | None, like: Tensor) -> Tensor:
    """The largest absolute eigenvalue, from products with the square of a symmetric ``matrix``.

    ``start``: the first vector ``(d,)``; ``None``: always the same random one, of the shape and dtype of ``like``.
    """
    if start is None:
        drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        start = drawn.to(like)
    return lanczos(lambda x: matrix(matrix(x)), start, 1)[0][0].clamp_min(0).sqrt()
