"""Which parameters a pattern means: names, globs, modules, classes of modules, predicates, or lists of these."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nngeom.core.errors import ArgumentTypeError, CollectionError

Pattern = Any  # a name, a glob, a module, a class of modules, a predicate (name, parameter) -> bool, or a list of these


@dataclass(frozen=True)
class Named:
    """A parameter as patterns see it: its first name, all of its names, its layer."""

    name: str
    aliases: tuple[str, ...]
    layer: str


def select(parameters: Sequence[Named], model: nn.Module | None, pattern: Pattern, role: str) -> set[str]:
    """The names that match; ``model`` is needed for modules and what takes the parameter itself.

    Raises :class:`CollectionError` where nothing matches, or the model is gone.
    """
    if isinstance(pattern, (list, tuple, set)):
        return set().union(*(select(parameters, model, p, role) for p in pattern)) if pattern else set()
    test = _test(model, pattern, role)
    found = {p.name for p in parameters if test(p)}
    if not found:
        names = [p.name for p in parameters]
        raise CollectionError(
            f"{role}={pattern!r} matches no parameter; the parameters are {names[:8]}{'...' if len(names) > 8 else ''}"
        )
    return found


def _test(model: nn.Module | None, pattern: Pattern, role: str) -> Callable[[Named], bool]:
    if isinstance(pattern, str):
        return lambda p: pattern == p.layer or any(_matches(alias, pattern) for alias in p.aliases)
    if isinstance(pattern, nn.Module):
        return _within([pattern], _needed(model, pattern, role))
    if isinstance(pattern, type) and issubclass(pattern, nn.Module):
        live = _needed(model, pattern, role)
        return _within([m for m in live.modules() if isinstance(m, pattern)], live)
    if not callable(pattern):
        raise ArgumentTypeError(
            f"{role} got {pattern!r}; expected a name, a glob, a module, a class of modules, a predicate "
            "(name, parameter) -> bool, or a list of these"
        )
    if not _takes_two(pattern):
        return lambda p: any(pattern(alias) for alias in p.aliases)
    table = dict(_needed(model, pattern, role).named_parameters(remove_duplicate=False))
    return lambda p: p.name in table and any(pattern(alias, table[p.name]) for alias in p.aliases)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def _within(modules: list[nn.Module], model: nn.Module) -> Callable[[Named], bool]:
    inside = {id(p) for module in modules for p in module.parameters()}
    table = dict(model.named_parameters(remove_duplicate=False))
    return lambda p: p.name in table and id(table[p.name]) in inside


def _needed(model: nn.Module | None, pattern: Pattern, role: str) -> nn.Module:
    if model is None:
        raise CollectionError(
            f"{role} got {pattern!r}, and the model that the collection was read off is not there any more (or it came "
            "from a file); use names or globs"
        )
    return model


def _takes_two(predicate: Callable[..., Any]) -> bool:
    """Whether a predicate wants the parameter beside its name."""
    try:
        inspect.signature(predicate).bind("", None)
    except (TypeError, ValueError):  # one argument, or a built-in without a signature
        return False
    return True
