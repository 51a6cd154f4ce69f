"""The step itself, once ``.grad`` holds directions: momentum, decoupled weight decay, learning rates of groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nngeom.core.whole import in_parts
from nngeom.optim.arguments import number


def descend(
    groups: list[dict[str, Any]],
    state: Any,
    step: int,
    curved: Mapping[Tensor, Tensor] | None,
    gradient: Mapping[Tensor, Tensor] | None,
) -> float:
    """Move all parameters along ``-lr`` times their averaged directions.

    Returns the change of the loss that the quadratic model predicts, ``g^T d + d^T (F + damping) d / 2`` for the step
    ``d``, given ``(F + damping)`` times the directions (``curved``) and the gradients ``g``; 0 without them. Under
    momentum the matrix is taken to be the same over the steps averaged.
    """
    predicted = 0.0
    for group in groups:
        lr, momentum, decay = [number(key, group[key], step) for key in ("lr", "momentum", "weight_decay")]
        moved = [p for p in group["params"] if p.grad is not None]
        if not moved:
            continue
        directions, products = [p.grad for p in moved], [] if curved is None else [curved[p] for p in moved]
        if momentum and curved is None and _fuses(moved, directions):
            _fused(state, moved, directions, lr=lr, momentum=momentum, decay=decay)
            continue
        if momentum:
            directions = _averaged(state, "momentum_buffer", moved, directions, momentum)
            products = _averaged(state, "curved_buffer", moved, products, momentum) if products else []
        for p, v, fv in zip(moved, directions, products):
            predicted += float(0.5 * lr * lr * (v * fv).sum() - lr * (gradient[p] * v).sum())  # type: ignore[index]
        if decay:
            torch._foreach_mul_(moved, 1 - lr * decay)
        torch._foreach_add_(moved, directions, alpha=-lr)
    return predicted


def _averaged(state: Any, key: str, parameters: list[Tensor], x: list[Tensor], momentum: float) -> list[Tensor]:
    """``buffer <- momentum buffer + x``, from zero."""
    buffers = _averages_of(state, key, parameters)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, x)
    return buffers


def _averages_of(state: Any, key: str, parameters: list[Tensor]) -> list[Tensor]:
    averages: list[Tensor] = []
    for p in parameters:
        mine = state[p]
        if key not in mine:
            mine[key] = torch.zeros_like(p)
        averages.append(mine[key])
    return averages


def _fuses(parameters: list[Tensor], directions: list[Tensor]) -> bool:
    """Whether torch has the whole step in one pass over these tensors."""
    for p, v in zip(parameters, directions):
        dtype = p.dtype
        fuses = p.is_cpu and dtype is v.dtype and (dtype is torch.float32 or dtype is torch.float64)
        if not (fuses and p.is_contiguous() and v.is_contiguous()) or in_parts(p):
            return False
    return True


def _fused(
    state: Any, parameters: list[Tensor], directions: list[Tensor], *, lr: float, momentum: float, decay: float
) -> None:
    """``p <- (1 - lr decay) p - lr b``, ``b <- momentum b + v``."""
    buffers = _averages_of(state, "momentum_buffer", parameters)
    if decay:
        torch._foreach_mul_(parameters, 1 - lr * decay)
    torch._fused_sgd_(
        parameters,
        directions,
        buffers,
        weight_decay=0.0,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
