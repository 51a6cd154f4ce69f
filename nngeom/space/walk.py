"""All modules of a model and their parameters, each place once: a third of the time of ``named_parameters``."""

from __future__ import annotations

from itertools import chain
from types import FunctionType
from typing import Any

from torch import nn

_NAMED_MODULES = nn.Module.named_modules


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """``(prefix of the names of its parameters, module)``, once for every name of a module, in order."""
    if not _is_plain(model):
        return [(f"{name}." if name else "", m) for name, m in model.named_modules(remove_duplicate=False)]
    found: list[tuple[str, nn.Module]] = []
    _walk(model, "", found)
    return found


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by all their names; of one that is tied under each."""
    return _named(model, named_modules(model))


def modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """Every module once."""
    return tuple(dict.fromkeys(m for _, m in named_modules(model)))


class Places:
    """The modules and the parameters of a model, found in one walk, and whether they are still in their places."""

    def __init__(self, model: nn.Module) -> None:
        self.named = named_modules(model)
        self.parameters = _named(model, self.named)
        self.modules = tuple({m: None for _, m in self.named})
        others = [
            m for m in self.modules if type(m).named_modules is not _NAMED_MODULES or "named_modules" in m.__dict__
        ]
        self._plain = _names_plainly(model) and not others
        self._names, self._held = self._children()
        self._ids = [id(x) for x in self._held]  # which theirs stay while these are held

    def are_current(self) -> bool:
        """Whether every module is known to hold the modules and parameters that it held, by the same names; ``False``
        where only another walk can tell.
        """
        if not self._plain:
            return False
        now, held = self._children()
        return now == self._names and list(map(id, held)) == self._ids

    def _children(self) -> tuple[list[Any], list[Any]]:
        """How many modules and parameters each module itself has, and all their names; and these, in order."""
        tables = [table for m in self.modules for table in (m._modules, m._parameters)]
        names = chain.from_iterable([table.keys() for table in tables])
        return [*map(len, tables), *names], [*chain.from_iterable([table.values() for table in tables])]


def _named(model: nn.Module, named: list[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    if not _names_plainly(model):
        return dict(model.named_parameters(remove_duplicate=False))
    return {prefix + name: p for prefix, m in named for name, p in m._parameters.items() if p is not None}


def _walk(module: nn.Module, prefix: str, found: list[tuple[str, nn.Module]]) -> None:
    found.append((prefix, module))
    for name, child in module._modules.items():
        if child is None:
            continue
        if type(child).named_modules is _NAMED_MODULES and "named_modules" not in child.__dict__:  # as _is_plain
            _walk(child, f"{prefix}{name}.", found)
        else:
            names = child.named_modules(prefix=prefix + name, remove_duplicate=False)
            found.extend((f"{inside}.", m) for inside, m in names)


def _is_plain(module: nn.Module) -> bool:
    return _method(module, "named_modules") is _NAMED_MODULES


def _names_plainly(model: nn.Module) -> bool:
    return _method(model, "named_parameters") is nn.Module.named_parameters


def _method(module: nn.Module, name: str) -> FunctionType | None:
    method: Any = getattr(module, name)
    return getattr(method, "__func__", None)
