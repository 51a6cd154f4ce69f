"""What a model does beside its graph, as far as it can be read: modes, hooks, attributes, functions, the kind of batch.

A graph does not tell which constants a model makes of its inputs: with a flag set, or in another mode, the same
operations may take the mean of the batch. What runs of a model have shown is believed of this one program alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all

from nngeom.capture.batch import Batch, items
from nngeom.capture.known_factors import Factors

_SAYING = frozenset([bool, int, float, str, bytes, type(None), torch.dtype, torch.device])
_WHOLE = (type, nn.Parameter, nn.Module, ModuleType)  # told by which object it is
_OF_TORCH = frozenset([*vars(nn.Module()), "_compiled_call_impl"])  # what every module may hold
_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")  # of all modules
_DEPTH, _MOST = 3, 64  # how far containers, objects and functions are followed, and how many entries, also of tensors


def program(modules: Sequence[nn.Module], function: Any, carried: Mapping[nn.Module, Collection[str]]) -> int:
    """A number for the ``modules`` of a model and the ``function`` of its outputs as they are now.

    Attributes that passes change themselves, the names ``carried`` by a module, have no part in it.
    """
    read = _Reading()
    hooks = tuple(tuple(getattr(of_all, name, ())) for name in _HOOKS)
    return hash((hooks, read.value(function, _DEPTH), *(read.module(m, carried.get(m, ())) for m in modules)))


def made_up(batch: Batch) -> Any:
    """How a batch is made up: containers, sizes and kinds of tensors, flags; what else it holds may be data."""
    if isinstance(batch, Tensor):
        return () if batch.is_nested else tuple(batch.shape), batch.dtype, batch.layout
    if isinstance(batch, bool):
        return batch
    keys = tuple(map(str, batch)) if isinstance(batch, Mapping) else ()
    return type(batch), keys, tuple(map(made_up, items(batch)))


class Looks:
    """The programs in which a model was looked at: the ``latest``, and all of them; and the ``factors`` then."""

    def __init__(self) -> None:
        self.latest: int | None = None
        self.all: set[int] = set()
        self.factors: list[Factors] = []

    def under(self, factors: Factors) -> None:
        """What was seen is believed as long as these hold."""
        if factors.matter and all(factors is not other for other in self.factors):
            self.factors.append(factors)

    def at(self, found: int) -> None:
        """The model was looked at as it was ``found``."""
        self.latest = found
        self.all.add(found)


class _Reading:
    """One look at everything; what is met again is read once."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}

    def module(self, m: nn.Module, carried: Collection[str]) -> tuple[Any, ...]:
        """Its class, mode, children and hooks; of one that is not torch's all that it holds."""
        held, kind = m.__dict__, type(m)
        own = tuple(map(id, (*m._modules.values(), *m._parameters.values())))
        common = (kind, m.training, own, tuple(m._forward_hooks), tuple(m._forward_pre_hooks))
        if kind.__module__.startswith("torch.nn."):
            return (*common, self.value(held["forward"], _DEPTH)) if "forward" in held else common
        names = [key for key in held if key not in _OF_TORCH and key not in carried]
        constants = tuple([self.value(x, 1) for x in m._buffers.values()])
        return (*common, self._of_class(kind), constants, *names, *(self.value(held[key], 2) for key in names))

    def _of_class(self, kind: type) -> Any:
        """Which methods and values it has, and what its ``forward`` refers to."""
        if id(kind) not in self.known:
            bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]
            held = [tuple(map(id, vars(base).values())) for base in bases]
            self.known[id(kind)] = hash((*held, self.value(getattr(kind, "forward", None), _DEPTH)))
        return self.known[id(kind)]

    def value(self, x: Any, depth: int) -> Any:
        """What a plain value, or a container of such, holds; which object another one is, and what that holds."""
        kind = type(x)  # which some objects answer for themselves, slowly, where they are asked
        if kind in _SAYING:
            return x
        if issubclass(kind, Tensor) and not issubclass(kind, nn.Parameter):
            return _constant(x)
        if not depth or issubclass(kind, _WHOLE):
            return id(x)
        at = id(x)
        if at not in self.known:
            self.known[at] = at  # of what holds itself
            self.known[at] = hash(self._inside(x, kind, depth))
        return self.known[at]

    def _inside(self, x: Any, kind: type, depth: int) -> Any:
        each = lambda values: tuple([self.value(y, depth - 1) for y in values])
        if kind is FunctionType:
            return x.__code__, each(_referred(x))
        if kind is MethodType:
            return id(x.__self__), self.value(x.__func__, depth)
        if kind is functools.partial:
            return each([x.func, *x.args, *x.keywords, *x.keywords.values()])
        if issubclass(kind, (tuple, list)):
            return len(x), each(list(itertools.islice(x, _MOST)))
        held = x if kind is dict else _held(x)
        few = dict(itertools.islice(held.items(), _MOST))
        return None if kind is dict else id(x), len(held), tuple(map(str, few)), each(few.values())


def _constant(x: Tensor) -> Any:
    """Which tensor it is and how often it was written in place; of a few numbers in the host's memory these too."""
    few = type(x) is Tensor and x.numel() <= _MOST and x.is_cpu and x.layout is torch.strided and not x.is_nested
    return id(x), None if x.is_inference() else x._version, str(x.tolist()) if few else None


def _held(x: Any) -> dict[str, Any]:
    """The attributes of an object that is no function, where it has any; not as its class would answer."""
    try:
        held: dict[str, Any] = {} if callable(x) else object.__getattribute__(x, "__dict__")
    except AttributeError:
        return {}
    return held


def _referred(f: FunctionType) -> list[Any]:
    """What a function refers to: what it closes over, defaults, and by name; nothing of functions of torch."""
    if (f.__module__ or "").partition(".")[0] == "torch":
        return []
    named, filled = f.__globals__, []
    for cell in f.__closure__ or ():
        try:
            filled.append(cell.cell_contents)
        except ValueError:  # not yet
            continue
    return [*filled, *(f.__defaults__ or ()), *[named[name] for name in f.__code__.co_names if name in named]]
