"""Products ``J v``: by tangents in one pass where the model has them, else by the rows of its Jacobian."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from nngeom.core import flat_products
from nngeom.core.draws import inner_products
from nngeom.core.errors import NNGeomError, UnsupportedError
from nngeom.pullback.many_tangents import AGREE
from nngeom.sweep.sweep import Chunk

T = TypeVar("T")


def tangents_or_rows(by_tangents: Callable[[], T], by_rows: Callable[[], T]) -> T:
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


def at_once_or_not(at_once: Callable[[], T], one_by_one: Callable[[], T]) -> T:
    """The first, or the second for models that have no second derivatives, of whatever error they say so."""
    try:
        return at_once()
    except RuntimeError as error:
        unsupported = isinstance(error, UnsupportedError)
        if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, NNGeomError) and not unsupported):
            raise
    return one_by_one()


def each(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``f`` of every ``x[j]``, stacked: mapped where torch can map it, else called one by one."""
    if len(x) > 1:
        with contextlib.suppress(RuntimeError, ValueError):
            return torch.func.vmap(f)(x)
    return torch.stack([f(row) for row in x])


def are_adjoint(u: Tensor, tangent: Tensor, pulled: Tensor, v: Tensor) -> bool:
    """Whether ``<u, J v> = <J^T u, v>`` to rounding; infinite ones are left to who looks for them."""
    left, right = (inner_products(x.unsqueeze(0), y.unsqueeze(0)) for x, y in ((tangent, u), (v, pulled)))
    rounding = torch.finfo(tangent.dtype).eps
    room = max(rounding**0.5, AGREE) * left.abs()
    if bool((left - right).abs() <= room):
        return True
    room = room + 100 * rounding * (u.norm() * tangent.norm() + pulled.norm() * v.norm())
    return bool(((left - right).abs() <= room) | ~torch.isfinite(room))


def times_rows(chunk: Chunk, v: Tensor) -> Tensor:
    """``J v`` for the rows of a chunk: ``[*b, d] -> [*b, k, n]``; zero where it uses no parameter."""
    parts = [flat_products.times(layout, j, v) for layout, j in chunk.jacobians.items()]
    return sum(parts[1:], parts[0]) if parts else v.new_zeros(*v.shape[:-1], 1, 1)
