"""Methods of objects that those who call them do not keep alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """The bound ``method`` while its object lives; then a function that returns ``None``."""
    held = WeakMethod(method)

    def call(*args: Any) -> Any:
        alive = held()
        return None if alive is None else alive(*args)

    return call
