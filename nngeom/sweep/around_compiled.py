"""Calls of a model that was compiled in place, ``model.compile()``: hooks on it would be compiled too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


class AroundCompiled:
    """``enter(module, args)`` before and ``leave(module, args, returned)`` after the calls of a compiled ``module``,
    with ``None`` of one that raised, until :meth:`remove`. Copies of the module, which torch leaves uncompiled, have
    neither.
    """

    def __init__(self, module: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> None:
        self.module, self.enter, self.leave = module, enter, leave
        self.compiled: Callable[..., Any] = module._compiled_call_impl  # type: ignore[assignment]
        self.module._compiled_call_impl = self.call

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """One call."""
        self.enter(self.module, args)
        returned = None
        try:
            returned = self.compiled(*args, **kwargs)
        finally:
            self.leave(self.module, args, returned)
        return returned

    def remove(self) -> None:
        """Leave the module as it was."""
        if self.module._compiled_call_impl == self.call:
            self.module._compiled_call_impl = self.compiled


Handle = RemovableHandle | AroundCompiled


def remove(handles: Iterable[Handle]) -> None:
    """Take all of them off."""
    for handle in handles:
        handle.remove()
