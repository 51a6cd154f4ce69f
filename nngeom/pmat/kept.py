"""Cholesky factors that are kept with the block that they are of: a solve takes as long as a product from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nngeom.core.damping import Damping
from nngeom.pmat.eigenvalues import definite_factor


def kept_factor(
    block: Any, made_of: tuple[Tensor, ...], m: Callable[[], Tensor], damping: Damping, what: str
) -> Tensor:
    """The Cholesky factor of ``m() + damping I``, the one of the last damping without factorising again.

    ``made_of``: the tensors that ``m`` is made of; where these were changed since it is made anew, and where a gradient
    is to pass it is not kept. ``what``: what an error calls the matrix. Raises :class:`SingularError`.
    """
    x: Any = damping.value
    traced = isinstance(x, Tensor) and x.requires_grad
    if traced or any(t.requires_grad or t.is_inference() for t in made_of):
        return definite_factor(m(), damping, what)
    state = (float(x), *(t._version for t in made_of))
    kept = block.__dict__.get("_kept")
    if kept is None or kept[0] != state:
        kept = state, definite_factor(m(), damping, what)
        block.__dict__["_kept"] = kept
    factor: Tensor = kept[1]
    return factor
