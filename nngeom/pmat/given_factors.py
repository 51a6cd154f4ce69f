"""Kronecker factors as plain tensors, by layer, and the blocks that they stand for.

A layer's weight is read as ``[s, o, i]``: ``s`` groups of ``o`` outputs and ``i`` inputs. From the sizes of the factors
alone follows how: output-major, as the weight of a linear layer or a convolution, wherever these fit; else
input-major, as a table of vectors or a transposed convolution. A table's input factor is a diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from operator import mul
from typing import Any

from torch import Tensor

from nngeom.core import linalg
from nngeom.core.errors import ArgumentError, ArgumentTypeError, StructureError
from nngeom.core.layout import Arrangement, Layout, Piece
from nngeom.pmat.block import Block, EyeBlock
from nngeom.pmat.given import foreign, require_alike, require_cover, require_entries, require_mapping, require_symmetric
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.space.collection import LayerCollection

Key = Any  # a layer, a parameter, or a tuple of a weight and its bias
Factors = tuple[Tensor, Tensor]


def blocks_of(collection: LayerCollection, given: Any) -> dict[Layout, KroneckerBlock]:
    """The blocks of ``{key: (A, G)}``, checked."""
    blocks = {}
    for key, pair in require_mapping(given, "(A, G)").items():
        a, g = _checked_pair(key, pair)
        blocks[layout_of(collection, key, a, g)] = KroneckerBlock(a, g)
    require_cover(collection, [name for layout in blocks for name in layout.names])
    require_alike([t for block in blocks.values() for t in block.tensors()])
    return blocks


def factors_of(collection: LayerCollection, blocks: dict[Layout, Block]) -> dict[Key, Factors]:
    """``{key: (A, G)}`` of :func:`blocks_of`; raises :class:`StructureError` for what these could not be read as."""
    return {_key(collection, layout): _pair(collection, layout, block) for layout, block in blocks.items()}


def _checked_pair(key: Key, pair: Any) -> Factors:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ArgumentTypeError(f"the factors of {key!r} are {type(pair).__name__}; expected a tuple (A, G)")
    grouped = any(isinstance(f, Tensor) and f.ndim == 3 for f in pair)
    return _factor(f"A of {key!r}", pair[0], grouped=grouped), _factor(f"G of {key!r}", pair[1], grouped=grouped)


def _factor(what: str, factor: Any, *, grouped: bool) -> Tensor:
    """``[s, p, p]`` or ``[s, p]`` of ``(p, p)`` or ``(p,)``, with a leading axis of groups where there are any."""
    axes = factor.ndim - grouped if isinstance(factor, Tensor) else 2
    if axes not in (1, 2):
        raise ArgumentError(
            f"{what} has shape {tuple(factor.shape)}; expected (p, p), or its diagonal (p,), with the groups of a "
            "layer as a leading axis of both factors"
        )
    f = require_entries(factor, what, *[None] * (axes + grouped))
    f = f if grouped else f.unsqueeze(0)
    if axes == 1:
        return f
    if f.shape[-1] != f.shape[-2]:
        raise ArgumentError(f"{what} has shape {tuple(factor.shape)}; expected a square matrix")
    return require_symmetric(f, what)


def layout_of(collection: LayerCollection, key: Key, a: Tensor, g: Tensor) -> Layout:
    """Where the block of the factors ``a [s, i, i]`` and ``g [s, o, o]`` lies; raises :class:`ArgumentError` where they
    do not fit the parameters.
    """
    names, table = _weight_and_bias(collection, key), collection.offsets()
    shapes = [table[name][1] for name in names]
    (s, o), i = (g.shape[0], g.shape[-1]), a.shape[-1] - (len(names) - 1)
    fits = a.shape[0] == s and len(names) <= 2 and math.prod(shapes[0]) == s * o * i
    weight = _arrangement(shapes[0], s, o, i, table=linalg.is_diagonal(a)) if fits else None
    if weight is None or (len(names) == 2 and math.prod(shapes[1]) != s * o):
        raise ArgumentError(
            f"the factors of {key!r} have shapes {tuple(a.shape)} and {tuple(g.shape)} (groups first), and its "
            f"parameters {dict(zip(names, shapes))}; expected A over the inputs (and a bias last), G over the outputs"
        )
    arrangements = [weight, Arrangement.plain(s, o, 1)]
    return Layout(tuple(Piece((n,), table[n][0], arranged) for n, arranged in zip(names, arrangements)))


def _weight_and_bias(collection: LayerCollection, key: Key) -> tuple[str, ...]:
    """The weight, and the bias behind it."""
    if isinstance(key, str):
        names = collection.by_layer().get(key, (key,))
    else:
        names = key if isinstance(key, tuple) else (key,)
    if not names or any(name not in collection for name in names):
        raise foreign(collection, key)
    return names


def _arrangement(shape: tuple[int, ...], s: int, o: int, i: int, *, table: bool) -> Arrangement | None:
    """How a parameter of this shape is read as ``[s, o, i]``; ``table``: input-major if that fits."""
    found = [*_output_major(shape, s, o, i), *_input_major(shape, s, o, i)]
    return (found[-1] if table else found[0]) if found else None


def _output_major(shape: tuple[int, ...], s: int, o: int, i: int) -> Iterator[Arrangement]:
    if s * o in accumulate(shape, mul, initial=1):
        yield Arrangement.plain(s, o, i)


def _input_major(shape: tuple[int, ...], s: int, o: int, i: int) -> Iterator[Arrangement]:
    if len(shape) < 2 or shape[0] % s or shape[1] != o:
        return
    if len(shape) > 2:
        yield Arrangement((s, shape[0] // s, o, math.prod(shape[2:])), (0, 2, 1, 3), (s, o, i))
    elif s == 1:
        yield Arrangement((1, i, o), (0, 2, 1), (1, o, i))


def _key(collection: LayerCollection, layout: Layout) -> Key:
    """What a block is called: its layer where that is all of it, else its parameters."""
    for layer, names in collection.by_layer().items():
        if names == layout.names:
            return layer
    return layout.names[0] if len(layout.names) == 1 else layout.names


def _pair(collection: LayerCollection, layout: Layout, block: Block) -> Factors:
    if isinstance(block, EyeBlock):  # of a parameter that the data does not use
        return block.c.expand(layout.numel).clone(), block.c.new_ones(1, 1)
    key = _key(collection, layout)
    if not isinstance(block, KroneckerBlock):
        raise StructureError(f"the block of {key!r} is a {type(block).__name__}, no Kronecker product")
    a, g = block.a.clone(), block.g.clone()
    try:
        same = layout_of(collection, key, a, g) == layout
    except ArgumentError:
        same = False
    if not same or (a.shape[0] > 1 and a.ndim == g.ndim == 2):
        raise StructureError(
            f"the factors of {key!r} do not say how its {layout.sizes} (groups, outputs, inputs) lie in the parameters "
            "(an einsum, a window with sua=True, inputs in groups, a square table or transposed kernel), so that "
            "from_factors would misread them; leave it out with M[...], or keep the matrix with nng.save"
        )
    return (a, g) if a.shape[0] > 1 else (a[0], g[0])
