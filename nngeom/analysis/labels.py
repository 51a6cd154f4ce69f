"""Class labels, however they are written: integers, booleans or whole floats, ``(n,)`` or ``(n, 1)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import OutputError


def class_labels(y: Any) -> Tensor | None:
    """``(n,)``, as integers; ``None`` where ``y`` holds none: several numbers an example, or one that is not whole."""
    if not isinstance(y, Tensor) or y.ndim == 0 or y.numel() != y.shape[0] or y.is_complex():
        return None
    flat = y.detach().reshape(-1)
    if flat.is_floating_point() and not bool((torch.isfinite(flat) & (flat == flat.round())).all()):
        return None
    return flat.long()


def require_class_labels(y: Any, examples: int, what: str) -> Tensor:
    """:func:`class_labels` of so many examples; raises :class:`OutputError` where there are none, or not as many."""
    labels = class_labels(y)
    if labels is None or len(labels) != examples:
        shapes = f"({examples},) or ({examples}, 1)"
        raise OutputError(f"{what} takes one class label an example, {shapes}; got {described(y)}")
    return labels


def signs(y: Any, examples: int, what: str) -> Tensor:
    """``(n,)``: -1 and 1, of labels that are 0 and 1, or -1 and 1; raises :class:`OutputError` for any others."""
    labels = require_class_labels(y, examples, what)
    if bool((labels.abs() > 1).any()) or bool((labels == -1).any() and (labels == 0).any()):
        raise OutputError(
            f"{what} with one output takes labels 0 and 1, or -1 and 1; got {labels.unique()[:8].tolist()} (targets of "
            "a regression are floating-point numbers)"
        )
    return torch.where(labels > 0, 1, -1)


def described(y: Any) -> str:
    """What was given instead of labels."""
    if not isinstance(y, Tensor):
        return "none" if y is None else type(y).__name__
    whole = "" if not y.is_floating_point() or y.numel() != len(y) else " that are not all whole"
    return f"{str(y.dtype).removeprefix('torch.')} targets {tuple(y.shape)}{whole}"
