"""The tensors among the arguments of a call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def tensors(items: Iterable[Any], named: Mapping[str, Any] | None = None) -> list[Tensor]:
    """All tensors in arguments, however deep."""
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            found += tensors(item)
        elif isinstance(item, dict):
            found += tensors(item.values())
    return found + tensors(named.values()) if named else found
