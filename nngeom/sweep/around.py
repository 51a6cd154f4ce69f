"""Calls of a module seen from around them: where hooks on it would be compiled too, and where they would take long."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_PLACE = "_compiled_call_impl"  # what torch calls instead of a module, if there is something


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called: hooks on it would be compiled too."""
    return getattr(module, _PLACE, None) is not None


def is_plain(module: nn.Module) -> bool:
    """Whether it is called as torch calls modules."""
    return type(module).__call__ is nn.Module.__call__ and not isinstance(module, torch.jit.ScriptModule)


class Around:
    """``enter(module, args)`` before and ``leave(module, args, returned)`` after the calls of a ``module``, with
    ``None`` of one that raised, until :meth:`remove`; others' hooks run in between. Copies of the module have neither.
    """

    def __init__(self, module: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> None:
        self.module, self.enter, self.leave = module, enter, leave
        self.before: Callable[..., Any] | None = getattr(module, _PLACE)
        module.__dict__[_PLACE] = self.call

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """One call."""
        self.enter(self.module, args)
        returned = None
        try:
            returned = (self.before or self.module._call_impl)(*args, **kwargs)
        finally:
            self.leave(self.module, args, returned)
        return returned

    def remove(self) -> None:
        """Leave the module as it was, others around its calls too."""
        place: Any = getattr(self.module, _PLACE)
        if place == self.call:
            self.module.__dict__.pop(_PLACE)
            if self.before is not None:
                self.module.__dict__[_PLACE] = self.before
            return
        while isinstance(outer := getattr(place, "__self__", None), Around):  # that came later
            if outer.before == self.call:
                outer.before = self.before
            place = outer.before


Handle = RemovableHandle | Around


def remove(handles: Iterable[Handle]) -> None:
    """Take all of them off."""
    for handle in handles:
        handle.remove()
