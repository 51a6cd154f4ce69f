"""The memory budget of the work in progress, and how work is cut to stay within it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from nngeom.core.errors import ArgumentError, MemoryWarning
from nngeom.core.given_plainly import require_real

DEFAULT_BUDGET = 2**30
CACHE_BYTES = 2**23  # temporaries that are squared or summed at once are kept about as large as a processor cache

_budget: ContextVar[int] = ContextVar("nngeom_memory_budget", default=DEFAULT_BUDGET)


def budget() -> int:
    """Bytes that temporaries may take."""
    return _budget.get()


class limit:
    """Sets the budget for the enclosed work; ``None`` keeps the one in force (1 GiB at first)."""

    def __init__(self, memory_budget: int | None) -> None:
        self.memory_budget = memory_budget

    def __enter__(self) -> int:
        asked = self.memory_budget
        if asked is not None:
            require_real(asked, "memory_budget")
        if asked is not None and asked <= 0:
            raise ArgumentError(
                f"memory_budget is {asked}; expected a positive number of bytes, or None for {DEFAULT_BUDGET}"
            )
        self.token = _budget.set(int(asked) if asked is not None else _budget.get())
        return _budget.get()

    def __exit__(self, *error: Any) -> None:
        _budget.reset(self.token)


def step(total: int, bytes_each: int, what: str = "", most: int | None = None) -> int:
    """How many of ``total`` items to take at once so that ``step * bytes_each`` stays within the budget (at least
    one).
    """
    allowed = min(budget(), most) if most is not None else budget()
    fit = allowed // max(1, bytes_each)
    if bytes_each > budget() and what:
        warnings.warn(
            f"memory_budget is {budget()} bytes but one {what} takes about {bytes_each}; working one {what} at a time",
            MemoryWarning,
            stacklevel=3,
        )
    return max(1, min(total, fit))


def pieces(total: int, bytes_each: int, what: str = "", most: int | None = None) -> Iterator[tuple[int, int]]:
    """``(lo, hi)`` ranges that cover ``range(total)``, about equally long and at most :func:`step`."""
    size = step(total, bytes_each, what, most)
    size = -(-total // max(1, -(-total // size)))
    for lo in range(0, total, max(1, size)):
        yield lo, min(total, lo + size)


class Working:
    """Working memory, overwritten by the next request of the same name: fresh pages cost more than the arithmetic that
    fills them.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, Tensor] = {}

    def __call__(self, name: Hashable, sizes: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised, of the dtype and on the device of ``like``."""
        numel, held = math.prod(sizes), self._held.get(name)
        if held is None or held.numel() < numel or held.dtype != like.dtype or held.device != like.device:
            held = self._held[name] = like.new_empty(numel)
        return held[:numel].view(*sizes)


def fresh(name: Hashable, sizes: Sequence[int], like: Tensor) -> Tensor:
    """As :class:`Working`, but never overwritten."""
    return like.new_empty(*sizes)
