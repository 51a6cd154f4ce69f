"""Objects as trees of plain values and named tensors, and back: what a file says is checked before it is believed.

An object is ``{"class": name, "qualified": module.name, "fields": {...}}`` (``qualified`` for what users may define
too), a tensor ``{"tensor": key}``, a dictionary ``{"items": [[key, value], ...]}``, a tuple a list, and numbers and text
are themselves. Only the classes listed here, and subclasses of PMat, FMat and Block that are imported, are made again.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nngeom.core.container import REAL
from nngeom.core.errors import ArgumentError, FileError, UnsupportedError
from nngeom.core.layout import Arrangement, Layout, Piece
from nngeom.core.registry import qualified
from nngeom.fmat.expression import FMatSum
from nngeom.fmat.fmat import FMat
from nngeom.maps.pull_back import PullBackDense
from nngeom.maps.push_forward import PushForwardDense
from nngeom.pmat.block import Block
from nngeom.pmat.expression import PMatProduct, PMatSum
from nngeom.pmat.pmat import PMat
from nngeom.space.collection import LayerCollection
from nngeom.space.fvector import FVector
from nngeom.space.pvector import PVector

Tensors = dict[str, Tensor]

OPEN: tuple[type, ...] = (PMat, FMat, Block)  # users subclass them
WHOLE: list[type] = [
    PVector,
    FVector,
    PMatSum,
    PMatProduct,
    FMatSum,
    PushForwardDense,
    PullBackDense,
]  # saved by themselves, as PMats and FMats
PARTS: list[type] = [LayerCollection, Layout, Piece, Arrangement]
_CLOSED = {cls.__name__: cls for cls in WHOLE + PARTS}


def is_whole(x: Any) -> bool:
    """Whether ``x`` is something that is saved by itself."""
    return type(x) in WHOLE or isinstance(x, (PMat, FMat))


# -- to a tree -------------------------------------------------------------------------------------------------------


def encode(x: Any, key: str, tensors: Tensors) -> Any:
    """The tree of ``x``; its tensors are added to ``tensors``, their keys beginning with ``key``."""
    if isinstance(x, Tensor):
        if x.dtype not in REAL.values():
            raise ArgumentError(f"cannot save {key!r}: it is {x.dtype}; expected real floating-point numbers")
        t = x.detach().to("cpu").contiguous()
        shared = t.numel() and any(
            t.untyped_storage().data_ptr() == s.untyped_storage().data_ptr() for s in tensors.values()
        )
        tensors[key] = t.clone() if shared or t.untyped_storage().nbytes() != t.nbytes else t
        return {"tensor": key}
    if dataclasses.is_dataclass(x):
        named, dot = _named(type(x)), f"{key}." if key else ""
        return {
            **named,
            "fields": {f.name: encode(getattr(x, f.name), dot + f.name, tensors) for f in dataclasses.fields(x)},
        }
    if isinstance(x, dict):
        return {
            "items": [
                [encode(k, f"{key}.{j}", tensors), encode(v, f"{key}.{j}", tensors)]
                for j, (k, v) in enumerate(x.items())
            ]
        }
    if isinstance(x, tuple):
        return [encode(v, f"{key}.{j}", tensors) for j, v in enumerate(x)]
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise UnsupportedError(
        f"cannot save a {type(x).__name__} in {key!r}; expected tensors, numbers, text, and tuples and dictionaries of these"
    )


def _named(cls: type) -> dict[str, str]:
    if _CLOSED.get(cls.__name__) is cls:
        return {"class": cls.__name__}
    base = next((base for base in OPEN if issubclass(cls, base)), None)
    if base is None:
        raise holds_model(cls)
    if not base.kinds.is_known(cls):  # type: ignore[attr-defined]
        raise ArgumentError(
            f"cannot save a {qualified(cls)}: that class was defined anew since, and a file would be read as the new one; measure it again"
        )
    return {"class": cls.__name__, "qualified": qualified(cls)}


def holds_model(cls: type) -> UnsupportedError:
    """The error for objects that cannot be saved because they run a model."""
    return UnsupportedError(
        f"{cls.__name__} holds a model and data, so it is not saved; save a PMatKFAC, PMatEKFAC, FMatDense, ... instead"
    )


# -- from a tree -----------------------------------------------------------------------------------------------------


def decode(x: Any, tensors: Tensors) -> Any:
    """What a tree describes; raises :class:`FileError`, or what the objects themselves raise."""
    if isinstance(x, list):
        return tuple(decode(v, tensors) for v in x)
    if not isinstance(x, dict):
        return x
    if x.keys() == {"tensor"}:
        return tensors[x["tensor"]]
    if x.keys() == {"items"}:
        items = [(decode(k, tensors), decode(v, tensors)) for k, v in x["items"]]
        if len(dict(items)) < len(items):
            raise FileError("a dictionary has a key twice")
        return dict(items)
    cls = _class(x["class"], x.get("qualified"))
    fields = {key: decode(v, tensors) for key, v in x["fields"].items()}
    _require_types(cls, fields)
    if issubclass(cls, PMat):
        return _matrix(cls, **fields)
    out = cls(**fields)
    for kind, check in _CHECKS.items():
        if isinstance(out, kind):
            check(out)
    return out


def _class(name: Any, full: Any) -> Any:
    if not isinstance(name, str) or not (full is None or isinstance(full, str)):
        raise FileError(f"a class is called {name!r}")
    if full is None and name in _CLOSED:
        return _CLOSED[name]
    for base in OPEN if full is None or full.rpartition(".")[2] == name else ():
        try:
            return base.kinds.find(name, full)  # type: ignore[attr-defined]
        except KeyError:
            pass
    what = f"it holds a {name!r}" + (f", {full}" if full else "")
    raise FileError(f"{what}, which this version does not know; upgrade nngeom, or import the module that defines it")


def _require_types(cls: type, fields: dict[str, Any]) -> None:
    """Every field is there and is what its class says; classes whose annotations cannot be looked up are believed."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception:
        return
    for f in dataclasses.fields(cls):
        if f.name in fields and not is_a(fields[f.name], hints.get(f.name, Any)):
            raise FileError(
                f"the fields of a {cls.__name__} have the wrong types: {f.name!r} is a {type(fields[f.name]).__name__}, expected {f.type}"
            )


def is_a(x: Any, hint: Any) -> bool:
    """Whether a value fits an annotation: classes, unions, tuples and dictionaries are told apart, all else is fine."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_a(x, arg) for arg in args)
    if origin is tuple and args[-1:] == (...,):
        return isinstance(x, tuple) and all(is_a(v, args[0]) for v in x)
    if origin is tuple:
        return isinstance(x, tuple) and len(x) == len(args) and all(map(is_a, x, args))
    if origin is dict:
        return isinstance(x, dict) and all(is_a(k, args[0]) and is_a(v, args[1]) for k, v in x.items())
    if hint in (int, float):
        return type(x) is int or type(x) is hint
    return not isinstance(hint, type) or isinstance(x, hint)


# -- whether values fit each other -----------------------------------------------------------------------------------


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise FileError(what)


def _collection(lc: LayerCollection) -> None:
    _require(len(lc.names) == len(lc.shapes) == len(lc.layers), "a collection has as many names as shapes and layers")
    _require(len(set(lc.names)) == len(lc.names) > 0, "the names of a collection differ, and there is one at least")
    _require(all(v >= 0 for shape in lc.shapes for v in shape), "a parameter has a negative size")


def _arrangement(a: Arrangement) -> None:
    _require(sorted(a.order) == list(range(len(a.view))), "the order of an arrangement is one of its axes")
    _require(
        all(v >= 0 for v in (*a.view, *a.sizes)) and math.prod(a.view) == math.prod(a.sizes),
        "the sizes of an arrangement are those of its parameter",
    )
    _require(a.window > 0 and a.sizes[2] % a.window == 0, "a window divides the inputs")


def _layout(layout: Layout) -> None:
    _require(
        len({p.arrangement.sizes[:2] for p in layout.pieces}) == 1,
        "the pieces of a layout have as many groups and outputs",
    )
    _require(all(p.names and p.offset >= 0 for p in layout.pieces), "the pieces of a layout have names and places")


def _sum(total: PMatSum | FMatSum) -> None:
    _require(
        len(total.parts) > 0 and len(total.weights or total.parts) == len(total.parts),
        "a sum has parts, and a weight for each or none",
    )
    place: Callable[[Any], Any] = lambda p: (
        p.collection if isinstance(total, PMatSum) else (p.outputs, p.rows, p.columns)
    )
    _require(all(place(a) == place(b) for a, b in pairwise(total.parts)), "the parts of a sum have the same shape")


_CHECKS: dict[type, Callable[[Any], None]] = {
    LayerCollection: _collection,
    Arrangement: _arrangement,
    Layout: _layout,
    PMatSum: _sum,
    FMatSum: _sum,
}


def _matrix(cls: type[PMat], layer_collection: LayerCollection, blocks: dict[Layout, Block], examples: int) -> PMat:
    """A matrix whose blocks cover its parameters, each once, and whose tensors have the sizes of their places."""
    _require(examples >= 0, f"the matrix was measured on {examples} examples")
    offsets = {name: (lo, lo + math.prod(shape)) for name, (lo, shape) in layer_collection.offsets().items()}
    pieces = sorted((piece for layout in blocks for piece in layout.pieces), key=lambda p: (p.offset, p.stop))
    for piece in pieces:
        _require(
            all(name in offsets for name in piece.names),
            f"there is a block of {list(piece.names)[:4]}, which are no parameters",
        )
        inside = offsets[piece.names[0]][0] <= piece.offset and piece.stop <= offsets[piece.names[-1]][1]
        _require(inside, f"the block of {list(piece.names)[:4]} lies outside of its parameters")
    bounds = [0, *(at for piece in pieces for at in (piece.offset, piece.stop)), layer_collection.numel]
    _require(
        all(a == b for a, b in zip(bounds[::2], bounds[1::2])),
        "the blocks do not cover the parameter vector, each place once",
    )
    dtypes = {_dtype(block, layout) for layout, block in blocks.items()}
    _require(len(dtypes) == 1, f"the blocks of the matrix have different dtypes, {sorted(map(str, dtypes))}")
    return cls._make(layer_collection, blocks, examples)


def _dtype(block: Block, layout: Layout) -> torch.dtype:
    """The dtype of a block, seen to act on its place; on shapes only, so that nothing is allocated that a file merely claims."""
    try:
        d = _acted(block.to("meta"))
    except (
        RuntimeError
    ):  # an operation that asks for numbers: the block itself, where its tensors are as large as its place
        d = _acted(block) if layout.numel <= sum(t.numel() for t in block.tensors()) else torch.empty(0)
    _require(
        tuple(d.shape) == layout.sizes, f"a block of {list(layout.names)[:4]} does not have the sizes of its parameters"
    )
    return d.dtype


def _acted(block: Block) -> Tensor:
    d = block.diag()
    return block.mv(torch.zeros_like(d)).reshape(block.sizes)
