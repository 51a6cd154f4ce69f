"""Steps of optimizers, counted on the optimizers themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class StepCounter:
    """Counts the steps of ``optimizers``, inside of wrappers, and calls ``each(count)`` after every one."""

    def __init__(self, optimizers: Iterable[Any], each: Callable[[int], None] = lambda count: None) -> None:
        self.count, self.each = 0, each
        self._depth = 0
        self._handles: list[Any] = []
        for optimizer in {id(o): o for o in map(inner, optimizers)}.values():
            self._handles.append(optimizer.register_step_pre_hook(self._enter))
            self._handles.append(optimizer.register_step_post_hook(self._leave))

    def _enter(self, *_: Any) -> None:
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:  # one step, also where it runs that of a parent class inside
            self.count += 1
            self.each(self.count)

    def remove(self) -> None:
        """Leave nothing on the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def inner(optimizer: Any) -> Any:
    """The optimizer inside of wrappers."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer
