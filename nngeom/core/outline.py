"""Three numbers that a tensor is known by again, to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

Sketch = tuple[float, float, float]


def outline(t: Tensor) -> Sketch:
    """Two sums of the entries, so weighted that little cancels, and that of their sizes."""
    if t.numel() == 0:
        return 0.0, 0.0, 0.0
    rows = t.reshape(-1, t.shape[-1] if t.ndim else 1).sum(-1, dtype=torch.float64)
    weights = (torch.arange(len(rows), dtype=torch.float64) * 0.6180339887498949).frac().add(0.5).to(rows.device)
    size = torch.linalg.vector_norm(t, 1, dtype=torch.float64)
    return float(rows.sum()), float(rows @ weights), float(size)


def alike(then: Sketch, now: Sketch, eps: float, size: float) -> bool:
    """Whether two outlines are the same but for ``eps**(2/3)`` of a ``size``, rounding of another machine."""
    room: float = eps ** (2 / 3) * size
    rows, weighted, sizes = (abs(a - b) for a, b in zip(then, now))
    return rows <= room and weighted <= 2 * room and sizes <= room
