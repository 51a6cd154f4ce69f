"""Which parameters make up parameter space, in which order, and to which layer each belongs."""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nngeom.core.errors import ArgumentTypeError, CollectionError
from nngeom.core.layout import Layout

Pattern = Any  # a name, a glob, a module, a predicate (name, parameter) -> bool, or a list of these


@dataclass(frozen=True)
class LayerCollection:
    """An ordered, model-free description of the selected parameters.

    Two collections are equal when names, shapes and order are: a vector of one instance of a model fits a matrix of
    another. A *layer* is the module that owns a parameter under its first name; a bare parameter of
    the root is a layer by itself, unless the model is a single layer of ``torch.nn``.

    ``names``, ``shapes`` and ``layers``: of the parameters, one each, in order; :meth:`from_model` reads them off a
    model.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layers: tuple[str, ...] = field(compare=False)  # the layer of every parameter

    @staticmethod
    def from_model(model: nn.Module, include: Pattern | None = None, exclude: Pattern | None = None) -> LayerCollection:
        """The trainable parameters of ``model``, in the order of ``model.named_parameters()``.

        ``include`` and ``exclude`` take names, glob patterns (``"blocks.*.mlp.*"``), names of modules, modules,
        predicates ``(name) -> bool`` or ``(name, parameter) -> bool``, or lists of these. Frozen parameters
        (``requires_grad=False``) are left out; tied parameters count once, under their first name, and match by any of
        their names.

        Raises :class:`CollectionError` when a pattern matches nothing or no parameter is left.
        """
        model = unwrap(model)
        aliases: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(p), []).append(name)
        every = dict(model.named_parameters())
        keep = set(every) if include is None else _select(model, every, aliases, include, "include")
        if exclude is not None:
            keep -= _select(model, every, aliases, exclude, "exclude")
        chosen = {name: p for name, p in every.items() if name in keep and p.requires_grad}
        for name, p in chosen.items():
            if not p.is_floating_point():
                raise CollectionError(
                    f"parameter {name!r} is {p.dtype}; expected a real floating-point parameter, exclude it"
                )
            if nn.parameter.is_lazy(p):
                raise CollectionError(f"parameter {name!r} is not initialised yet; run the model once on a batch first")
        if not any(p.numel() for p in chosen.values()):
            frozen = sum(not p.requires_grad for p in every.values())
            raise CollectionError(
                f"no parameter is left in the collection: the model has {len(every)} ({frozen} frozen), "
                f"include={include!r} and exclude={exclude!r} keep {len(keep)}; expected at least one trainable "
                "parameter"
            )
        root = (
            type(model).__name__ if type(model).__module__.startswith("torch.nn") else None
        )  # a single layer as the model
        layers = tuple(name.rpartition(".")[0] or root or name for name in chosen)
        return LayerCollection(tuple(chosen), tuple(tuple(p.shape) for p in chosen.values()), layers)

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def numel(self) -> int:
        """``d``: number of parameters."""
        return sum(math.prod(s) for s in self.shapes)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def offsets(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """``name -> (offset in the flat vector, shape)``."""
        table, lo = {}, 0
        for name, shape in zip(self.names, self.shapes):
            table[name] = (lo, shape)
            lo += math.prod(shape)
        return table

    def by_layer(self) -> dict[str, tuple[str, ...]]:
        """``layer -> its parameters``, in order of first appearance."""
        table: dict[str, tuple[str, ...]] = {}
        for name, layer in zip(self.names, self.layers):
            table[layer] = (*table.get(layer, ()), name)
        return table

    def only(self, names: Iterable[str]) -> LayerCollection:
        """The collection of some of these parameters, ``names``, in this order."""
        kept = set(names)
        chosen = [entry for entry in zip(self.names, self.shapes, self.layers) if entry[0] in kept]
        return LayerCollection(*(tuple(part) for part in zip(*chosen)))

    def span(self, names: Iterable[str] | None = None) -> Layout:
        """The layout of whole parameters, ``names``, in flat order (all of them by default)."""
        table = self.offsets()
        return Layout.span([(n, table[n][0], math.prod(table[n][1])) for n in (self.names if names is None else names)])

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The live parameters of a model; raises :class:`CollectionError` where one is missing, frozen or reshaped."""
        named = dict(unwrap(model).named_parameters(remove_duplicate=False))
        for name, shape in zip(self.names, self.shapes):
            if name not in named:
                raise CollectionError(f"the model has no parameter {name!r}; the collection belongs to another model")
            if tuple(named[name].shape) != shape:
                raise CollectionError(
                    f"parameter {name!r} has shape {tuple(named[name].shape)}; the collection expects {shape}"
                )
            if not named[name].requires_grad:
                raise CollectionError(f"parameter {name!r} is frozen now; build the collection after freezing")
        return {name: named[name] for name in self.names}

    def require(self, other: LayerCollection, what: str) -> None:
        """Raise :class:`CollectionError`, which calls it ``what``, unless ``other`` is the same collection."""
        if self == other:
            return
        mine, theirs = dict(zip(self.names, self.shapes)), dict(zip(other.names, other.shapes))
        if mine == theirs:
            raise CollectionError(
                f"{what} has the same parameters in another order: {list(other.names)[:4]}..., expected "
                f"{list(self.names)[:4]}..."
            )
        odd = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
        raise CollectionError(
            f"{what} belongs to another collection ({other.numel} parameters, expected {self.numel}); "
            f"they differ in {odd[:4]}{'...' if len(odd) > 4 else ''}; build it with the matrix's layer_collection"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, ``DataParallel`` or ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _takes_two(predicate: Callable[..., Any]) -> bool:
    """Whether a predicate wants the parameter beside its name."""
    try:
        inspect.signature(predicate).bind("", None)
    except (TypeError, ValueError):  # one argument, or a built-in without a signature
        return False
    return True


def _select(
    model: nn.Module, every: dict[str, nn.Parameter], aliases: dict[int, list[str]], pattern: Pattern, role: str
) -> set[str]:
    if isinstance(pattern, (list, tuple, set)):
        return set().union(*(_select(model, every, aliases, p, role) for p in pattern)) if pattern else set()
    test: Callable[[str, torch.Tensor], bool]
    if isinstance(pattern, str):
        test = lambda name, p: fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")
    elif isinstance(pattern, nn.Module):
        inside = {id(p) for p in pattern.parameters()}
        test = lambda name, p: id(p) in inside
    elif callable(pattern):
        test = pattern if _takes_two(pattern) else lambda name, p: pattern(name)
    else:
        raise ArgumentTypeError(
            f"{role} got {pattern!r}; expected a name, a glob, a module, a predicate (name, parameter) -> bool, "
            "or a list of these"
        )
    found = {name for name, p in every.items() if any(test(alias, p) for alias in aliases[id(p)])}
    if not found:
        raise CollectionError(
            f"{role}={pattern!r} matches no parameter; the model's parameters are "
            f"{list(every)[:8]}{'...' if len(every) > 8 else ''}"
        )
    return found
