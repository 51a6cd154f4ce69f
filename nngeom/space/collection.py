"""Which parameters make up parameter space, in which order, and to which layer each belongs."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from nngeom.core.errors import ArgumentTypeError, CollectionError
from nngeom.core.given_plainly import described
from nngeom.core.layout import Layout
from nngeom.space.patterns import Named, Pattern, select
from nngeom.space.walk import named_parameters


class Count(int):
    """A number that also answers when it is called, as ``numel()`` of tensors does."""

    def __call__(self) -> int:
        return int(self)


@dataclass(frozen=True)
class LayerCollection:
    """An ordered, model-free description of the selected parameters.

    Two collections are equal when names, shapes and order are: a vector of one instance of a model fits a matrix of
    another. A *layer* is the module that owns a parameter under its first name; a bare parameter of
    the root is a layer by itself, unless the model is a single layer of ``torch.nn``.

    ``names``, ``shapes`` and ``layers``: of the parameters, one each, in order; ``aliases``: all names of each, where
    some are tied. :meth:`from_model` reads them off a model, which the collection does not keep alive.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layers: tuple[str, ...] = field(compare=False)  # the layer of every parameter
    aliases: tuple[tuple[str, ...], ...] = field(default=(), compare=False, repr=False)

    @staticmethod
    def from_model(model: nn.Module, include: Pattern | None = None, exclude: Pattern | None = None) -> LayerCollection:
        """The trainable parameters of ``model``, in the order of ``model.named_parameters()``.

        ``include`` and ``exclude`` take names, glob patterns (``"blocks.*.mlp.*"``), names of modules, modules, classes
        of modules, predicates ``(name) -> bool`` or ``(name, parameter) -> bool``, or lists of these. Frozen parameters
        (``requires_grad=False``) are left out; tied parameters count once, under their first name, and match by any of
        their names.

        Raises :class:`CollectionError` when a pattern matches nothing or no parameter is left.
        """
        model = unwrap(model)
        return LayerCollection.among(model, named_parameters(model), include, exclude)

    @staticmethod
    def among(
        model: nn.Module, parameters: Mapping[str, nn.Parameter], include: Pattern | None, exclude: Pattern | None
    ) -> LayerCollection:
        """As :meth:`from_model`, with the ``parameters`` of the ``model`` by all their names; ``include``, ``exclude``:
        see there.
        """
        aliases: dict[int, list[str]] = {}
        found: dict[int, nn.Parameter] = {}
        for name, p in parameters.items():
            aliases.setdefault(id(p), []).append(name)
            found[id(p)] = p
        every = {names[0]: found[id_] for id_, names in aliases.items()}
        kind = type(model)
        root = kind.__name__ if kind.__module__.startswith("torch.nn") else None  # a single layer as the model
        layers = {name: name.rpartition(".")[0] or root or name for name in every}
        known = [Named(name, tuple(aliases[id(p)]), layers[name]) for name, p in every.items()]
        keep = set(every) if include is None else select(known, model, include, "include")
        if exclude is not None:
            keep -= select(known, model, exclude, "exclude")
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
        tied = any(len(aliases[id(p)]) > 1 for p in chosen.values())
        lc = LayerCollection(
            tuple(chosen),
            tuple(tuple(p.shape) for p in chosen.values()),
            tuple(layers[name] for name in chosen),
            tuple(tuple(aliases[id(p)]) for p in chosen.values()) if tied else (),
        )
        object.__setattr__(lc, "_source", weakref.ref(model))
        return lc

    @staticmethod
    def whole(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> LayerCollection:
        """All trainable ``parameters`` of a ``model``, as :meth:`among`; that of before where these are the same."""
        seen = tuple((name, id(p), p.requires_grad, p.shape, p.dtype) for name, p in parameters.items())
        known = _WHOLE.get(model)
        if known is None or known[0] != seen:
            known = _WHOLE[model] = seen, LayerCollection.among(model, parameters, None, None)
        return known[1]

    def subset(self, pattern: Pattern, role: str = "pattern") -> LayerCollection:
        """The parameters that ``pattern`` means, in the same order; patterns as :meth:`from_model` takes them.

        Modules, and predicates of the parameter itself, need the model, which must still be there. ``role``: what an
        error calls the pattern. Raises :class:`CollectionError` where nothing matches.
        """
        aliases = self.aliases or tuple((name,) for name in self.names)
        model = self._source() if self._source is not None else None
        return self.only(select([Named(*x) for x in zip(self.names, aliases, self.layers)], model, pattern, role))

    def part(self, pattern: Pattern) -> LayerCollection:
        """The parameters of the layer of this name, and of no other inside of it; else what the ``pattern`` means, see
        :meth:`subset`.
        """
        names = self.by_layer().get(pattern) if isinstance(pattern, str) else None
        return self.subset(pattern) if names is None else self.only(names)

    def only(self, names: Iterable[str]) -> LayerCollection:
        """The parameters of these ``names``, in the same order."""
        chosen = set(names)
        keep = [j for j, name in enumerate(self.names) if name in chosen]
        lc = LayerCollection(
            tuple(self.names[j] for j in keep),
            tuple(self.shapes[j] for j in keep),
            tuple(self.layers[j] for j in keep),
            tuple(self.aliases[j] for j in keep) if self.aliases else (),
        )
        object.__setattr__(lc, "_source", self._source)
        return lc

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_source"}

    _source: ClassVar[Any] = None  # a weak reference to the model it was read off, which patterns may need

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def numel(self) -> Count:
        """``d``: number of parameters, as ``numel`` or ``numel()``."""
        return Count(sum(math.prod(s) for s in self.shapes))

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

    def span(self, names: Iterable[str] | None = None) -> Layout:
        """The layout of whole parameters, ``names``, in flat order (all of them by default)."""
        table = self.offsets()
        return Layout.span([(n, table[n][0], math.prod(table[n][1])) for n in (self.names if names is None else names)])

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The live parameters of a model; raises :class:`CollectionError` where one is missing, frozen or reshaped."""
        return self.live(named_parameters(unwrap(model)))

    def live(self, named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those of this collection among the parameters of a model ``named``, all by all their names."""
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


_WHOLE: weakref.WeakKeyDictionary[nn.Module, tuple[Any, LayerCollection]] = weakref.WeakKeyDictionary()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, ``DataParallel`` or ``torch.compile``."""
    while True:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model is {described(model)}; expected a torch.nn.Module")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in vars(model).get("_modules", ()):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def doors(model: nn.Module) -> list[nn.Module]:
    """The modules that are called when ``model`` is: the one inside of wrappers, and around it what
    ``torch.compile`` made, before which nothing is compiled.
    """
    inner, found = unwrap(model), []
    while model is not inner:
        compiled = isinstance(getattr(model, "_orig_mod", None), nn.Module)
        found += [model] if compiled else []
        model = model._orig_mod if compiled else model.module  # type: ignore[assignment]
    return [*found, inner]
