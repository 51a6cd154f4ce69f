"""Gradients whose loss a ``GradScaler`` multiplied, divided again."""

from __future__ import annotations

from typing import Any

from nngeom.core.errors import ArgumentError


def unscale(opt: Any) -> bool:
    """Do what ``GradScaler.step`` left to the optimizer ``opt``; ``False`` where it found gradients not finite.

    Raises :class:`ArgumentError` where gradients were unscaled before and what was observed was not.
    """
    if not hasattr(opt, "found_inf"):
        return True
    scale = getattr(opt, "grad_scale", None)
    if bool(opt.found_inf):
        return False
    if scale is not None:
        opt.pending.loss_scale = float(scale)
        for p in (p for group in opt.param_groups for p in group["params"]):
            if p.grad is not None:
                p.grad.mul_(1 / opt.pending.loss_scale)
    elif opt.pending.loss_scale == 1.0 and opt.pending.examples and opt.observer.cotangents is None:
        raise ArgumentError(
            "scaler.unscale_(opt) unscaled the gradients and not what was observed: pass observe(scaler=scaler)"
        )
    return True
