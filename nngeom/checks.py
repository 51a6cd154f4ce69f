"""Whether what a file says of an object fits: the types of its fields, and its values each other.

Nothing is made here that is much larger than what the file holds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from nngeom.core.completed import CompletedBasis
from nngeom.core.errors import FileError
from nngeom.core.layout import Arrangement, Layout
from nngeom.fmat.expression import FMatSum
from nngeom.pmat.block import Block
from nngeom.pmat.pmat import PMat
from nngeom.pmat.sums import PMatSum
from nngeom.space.collection import LayerCollection


def require_types(cls: type, fields: dict[str, Any]) -> None:
    """Every field is there and is what its class says; classes whose annotations cannot be looked up are believed."""
    hints = _hints(cls)
    for f in dataclasses.fields(cls):
        if f.name in fields and not is_a(fields[f.name], hints.get(f.name, Any)):
            raise FileError(
                f"the fields of a {cls.__name__} have the wrong types: {f.name!r} is a "
                f"{type(fields[f.name]).__name__}, expected {f.type}"
            )


@functools.lru_cache(maxsize=256)
def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except Exception:  # names that are only there for type checkers
        return {}


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
    return hint is Any or not isinstance(hint, type) or isinstance(x, hint)  # Any is a class since Python 3.11


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise FileError(what)


def _collection(lc: LayerCollection) -> None:
    _require(len(lc.names) == len(lc.shapes) == len(lc.layers), "a collection has as many names as shapes and layers")
    _require(len(lc.aliases) in (0, len(lc.names)), "a collection has as many lists of names as names, or none")
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
        p.layer_collection if isinstance(total, PMatSum) else (p.outputs, p.rows, p.columns)
    )
    _require(all(place(a) == place(b) for a, b in pairwise(total.parts)), "the parts of a sum have the same shape")


def _basis(b: CompletedBasis) -> None:
    s, p, r = b.u.shape if b.u.ndim == 3 else (0, 0, 0)
    _require(
        0 < r < p and b.k.shape == b.c.shape == (s, r, r), "a basis has fewer given vectors than coordinates, and one"
    )


_FITS: dict[type, Callable[[Any], None]] = {
    LayerCollection: _collection,
    Arrangement: _arrangement,
    Layout: _layout,
    CompletedBasis: _basis,
    PMatSum: _sum,
    FMatSum: _sum,
}


def require_fit(x: Any) -> None:
    """The values of an object fit each other, where its class does not see to that itself."""
    if type(x) in _FITS:
        _FITS[type(x)](x)


def matrix(cls: type[PMat], layer_collection: LayerCollection, blocks: dict[Layout, Block], examples: int) -> PMat:
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
    dtypes = {t.dtype for block in blocks.values() for t in block.tensors()}
    _require(len(dtypes) == 1, f"the blocks of the matrix have the dtypes {sorted(map(str, dtypes))}, expected one")
    for layout, block in blocks.items():
        what = f"a block of {list(layout.names)[:4]} does not have the sizes of its parameters"
        try:  # a batch of no vectors: shapes are compared, and nothing is made
            x = torch.zeros(0, *layout.sizes, dtype=next(iter(dtypes)))
            _require(block.mv(x).shape == x.shape and _sizes(block, layout.numel) == layout.sizes, what)
        except RuntimeError as error:
            raise FileError(f"{what}: {error}") from error
    return cls.of_blocks(layer_collection, blocks, examples)


def _sizes(block: Block, claimed: int) -> tuple[int, ...]:
    """The sizes of a block; read off its diagonal only where that is not far larger than what is held."""
    held = sum(t.numel() for t in block.tensors())
    if type(block).sizes is Block.sizes and claimed > max(4 * held, 2**20):
        name = type(block).__name__
        raise FileError(
            f"a {name} claims {claimed} parameters and holds {held} numbers; a class of such blocks says its sizes "
            f"without forming the diagonal: {name}.sizes"
        )
    return tuple(block.sizes)
