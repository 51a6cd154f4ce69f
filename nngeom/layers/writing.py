"""Calls that write into a parameter they are given, though their names do not say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F


def _renormalised(
    input: Tensor, weight: Tensor, other: Any = None, max_norm: float | None = None, *options: Any, **named: Any
) -> Tensor | None:
    """Rows of a table that are longer than ``max_norm`` are shortened in place."""
    return None if max_norm is None else weight


WRITERS: dict[Any, Callable[..., Tensor | None]] = {F.embedding: _renormalised, F.embedding_bag: _renormalised}
"""What the call of a function writes, from its arguments; ``None`` where it writes nothing."""
