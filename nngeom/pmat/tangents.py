"""Products ``J v``: by tangents in one pass where the model has them, else by the rows of its Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nngeom.core.errors import NNGeomError
from nngeom.generator.sweep import Chunk


def tangents_or_rows(by_tangents: Callable[[], Tensor], by_rows: Callable[[], Tensor]) -> Tensor:
    """The first, or the second for models that have neither forward mode nor second derivatives.

    So are distance functions, compiled parts, functions marked ``once_differentiable``, activations saved by
    checkpoints: torch says it in a ``RuntimeError``. Errors of this library, and memory that ran out, are passed on.
    """
    try:
        return by_tangents()
    except (NNGeomError, torch.OutOfMemoryError):
        raise
    except RuntimeError:
        return by_rows()


def require_adjoint(u: Tensor, tangent: Tensor, pulled: Tensor, v: Tensor) -> None:
    """Raise ``RuntimeError`` where ``<u, J v>`` and ``<J^T u, v>`` differ: the two modes disagree at these very numbers."""
    left, right = (u * tangent).double(), (pulled * v).double()
    rounding = torch.finfo(u.dtype).eps
    room = rounding**0.5 * left.sum().abs() + 100 * rounding * (left.abs().sum() + right.abs().sum())
    if not bool((left.sum() - right.sum()).abs() <= room) and bool(torch.isfinite(room)):
        raise RuntimeError("forward and reverse mode disagree at these numbers")


def times_rows(chunk: Chunk, v: Tensor) -> Tensor:
    """``J v`` for the rows of a chunk: ``[*b, d] -> [*b, k, n]``; zero where it uses no parameter."""
    parts = [j.jvp(layout.gather(v).to(j.dtype)).to(v.dtype) for layout, j in chunk.jacobians.items()]
    return torch.stack(parts).sum(0) if parts else v.new_zeros(*v.shape[:-1], 1, 1)
