"""Random numbers that a forward pass draws and never uses are let pass; all others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from nngeom.capture.arguments import tensors
from nngeom.capture.untouched import HINT, Watch, differ
from nngeom.core.errors import ModeError


def require_unused(run: Callable[[], Tensor], watch: Watch) -> None:
    """Raise :class:`ModeError` where random numbers that ``run`` draws go into another operation, or are its outputs.

    Numbers that are the same whatever the state of the generators before, as those of one that the pass seeds itself,
    are none.
    """
    outputs, draws = _watched(run, watch)
    if id(outputs) in draws.drawn:
        draws.used = draws.drawn[id(outputs)][1]
    if (draws.used is not None or not draws.drawn) and not _constant(run, watch, outputs, draws):
        where = f", by {draws.used}" if draws.used else ""
        raise ModeError(f"the model draws random numbers in its forward pass{where}, {HINT}")
    watch.harmless = True


def _watched(run: Callable[[], Tensor], watch: Watch) -> tuple[Tensor, _Draws]:
    draws = _Draws(watch.generators())
    watch.harmless = True
    try:
        with watch.own(draws.private), _Uses(draws), draws:
            return run(), draws
    finally:
        watch.harmless = False


def _constant(run: Callable[[], Tensor], watch: Watch, outputs: Tensor, first: _Draws) -> bool:
    """Whether the same numbers are drawn from other states."""
    generators = [*watch.generators(), *first.private]
    states = [g.get_state() for g in generators]
    try:
        for g in generators:
            g.manual_seed(20_240_229)
        again, second = _watched(run, watch)
    finally:
        for g, state in zip(generators, states):
            g.set_state(state)
    told = lambda draws: [*draws.private.values(), *draws.after]
    same = len(first.private) == len(second.private) and len(first.after) == len(second.after)
    return same and not any(map(differ, told(first), told(second))) and torch.equal(outputs, again)


class _Draws(TorchFunctionMode):
    """Sees which operation draws, and whether what it drew is used."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        super().__init__()
        self.generators = generators
        self.private: dict[torch.Generator, Tensor] = {}  # generators given to calls, with their states before
        self.used: str | None = None  # the operation that drew what is used
        self.drawn: dict[int, tuple[Tensor, str]] = {}
        self.after: list[Tensor] = []  # the states of the generators after the last draw from one of them

    def see(self, args: Any, kwargs: Any) -> None:
        """What an operation takes."""
        for x in tensors(args, kwargs):
            if self.used is None and id(x) in self.drawn:
                self.used = self.drawn[id(x)][1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.see(args, kwargs)
        private = kwargs.get("generator")
        if isinstance(private, torch.Generator):
            self.private.setdefault(private, private.get_state())
        watched = [*self.generators, *self.private]
        before = [g.get_state() for g in watched]
        out = func(*args, **kwargs)
        changed = [differ(g.get_state(), state) for g, state in zip(watched, before)]
        if any(changed[: len(self.generators)]):
            self.after = [g.get_state() for g in self.generators]
        if any(changed):
            name = resolve_name(func) or getattr(func, "__name__", str(func))
            for x in tensors((out,)):
                self.drawn[id(x)] = (x, name)
        return out


class _Uses(TorchDispatchMode):
    """Sees what is done with numbers that were drawn where functions do not tell: in scripts, in functions with a
    backward pass of their own.
    """

    def __init__(self, draws: _Draws) -> None:
        super().__init__()
        self.draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.draws.see(args, kwargs or {})
        return func(*args, **(kwargs or {}))
