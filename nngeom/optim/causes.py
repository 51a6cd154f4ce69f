"""Why a step is not taken: the loss, the gradient of a layer, or its statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nngeom.core.statistic import Stacked, names_of
from nngeom.core.whole import local
from nngeom.optim.curvature import Curvature


def cause(loss: Any, parameters: Mapping[str, Tensor], parts: Iterable[Curvature]) -> tuple[str, str]:
    """The kind of what is not finite, and its words: the ``loss`` where one is known, gradients of ``parameters``, or
    statistics of ``parts``.
    """
    if isinstance(loss, Tensor) and not bool(torch.isfinite(loss).all()):
        return "loss", f"the loss is {float(loss.sum())}"
    words = broken(parameters)
    if words is not None:
        return "gradient", words
    for part in parts:
        if not part.finite():
            blocks = [block for block, named in part.pending.sums.items() if not all(map(_finite, named.values()))]
            names = [name for block in blocks for name in names_of(block)] or list(part.selection.names)
            return "statistics", f"the gradient of {_some(names)} is finite, and the squares of its examples' are not"
    return "gradient", "the sum of all gradients overflows"


def broken(parameters: Mapping[str, Tensor]) -> str | None:
    """Whose gradient is not finite, in words."""
    grads = [local(p.grad) for p in parameters.values() if p.grad is not None and not p.grad.is_sparse]
    sparse = any(p.grad is not None and p.grad.is_sparse for p in parameters.values())
    if not sparse and (not grads or bool(torch.isfinite(torch.stack(torch._foreach_norm(grads)).sum()))):
        return None
    named = [name for name, p in parameters.items() if p.grad is not None and not _finite(local(p.grad))]
    return f"the gradient of {_some(named)} is not finite" if named else None


def _finite(x: Tensor | Stacked) -> bool:
    if isinstance(x, Stacked):
        return all(map(_finite, x.parts))
    return bool(torch.isfinite(x.coalesce().values() if x.is_sparse else x).all())


def _some(names: list[str]) -> str:
    return f"{', '.join(map(repr, names[:2]))}{f' and {len(names) - 2} more' if len(names) > 2 else ''}"
