"""All modules of a model and their parameters, each place once: a third of the time of ``named_parameters``."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import nn


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """``(prefix of the names of its parameters, module)``, once for every name of a module, in order."""
    if not _is_plain(model):
        return [(f"{name}." if name else "", m) for name, m in model.named_modules(remove_duplicate=False)]
    found: list[tuple[str, nn.Module]] = []
    _walk(model, "", found)
    return found


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by all their names; of one that is tied under each."""
    if _method(model, "named_parameters") is not nn.Module.named_parameters:
        return dict(model.named_parameters(remove_duplicate=False))
    places = ((prefix, m._parameters.items()) for prefix, m in named_modules(model))
    return {prefix + name: p for prefix, items in places for name, p in items if p is not None}


def modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """Every module once."""
    return tuple(dict.fromkeys(m for _, m in named_modules(model)))


def _walk(module: nn.Module, prefix: str, found: list[tuple[str, nn.Module]]) -> None:
    found.append((prefix, module))
    for name, child in module._modules.items():
        if child is None:
            continue
        if _is_plain(child):
            _walk(child, f"{prefix}{name}.", found)
        else:
            names = child.named_modules(prefix=prefix + name, remove_duplicate=False)
            found.extend((f"{inside}.", m) for inside, m in names)


def _is_plain(module: nn.Module) -> bool:
    return _method(module, "named_modules") is nn.Module.named_modules


def _method(module: nn.Module, name: str) -> FunctionType | None:
    method: Any = getattr(module, name)
    return getattr(method, "__func__", None)
