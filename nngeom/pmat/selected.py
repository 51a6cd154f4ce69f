"""The part of a matrix over some of its parameters: a principal submatrix, of the same kind.

Blocks that are kept whole only move; of a block that is cut, its kind says what is left.
"""

from __future__ import annotations

import math
from dataclasses import replace

from nngeom.core.layout import Layout
from nngeom.pmat.block import Block
from nngeom.space.collection import LayerCollection


def blocks_within(blocks: dict[Layout, Block], whole: LayerCollection, part: LayerCollection) -> dict[Layout, Block]:
    """The blocks of the principal submatrix over the parameters of ``part``, of the ``blocks`` over the ``whole``."""
    found: dict[Layout, Block] = {}
    for layout, block in blocks.items():
        kept = [name for name in layout.names if name in part]
        if len(kept) == len(layout.names):
            found[moved(layout, part)] = block
        elif kept:
            pieces = Layout(tuple(p for p in layout.pieces if p.names[0] in part))
            left = part.span(kept) if layout.is_span else moved(pieces, part)
            found[left] = block.restricted(_columns(layout, whole, part))
    return found


def moved(layout: Layout, part: LayerCollection) -> Layout:
    """The place of a whole block in the flat vector of some of the parameters."""
    if layout.is_span:
        return part.span(layout.names)
    table = part.offsets()
    return Layout(tuple(replace(p, offset=table[p.names[0]][0]) for p in layout.pieces))


def _columns(layout: Layout, whole: LayerCollection, part: LayerCollection) -> list[int]:
    """Which inputs of a block belong to parameters of the ``part``."""
    if layout.is_span:
        table = whole.offsets()
        widths = [(name, math.prod(table[name][1])) for name in layout.names]
    else:
        widths = [(p.names[0], p.arrangement.sizes[2]) for p in layout.pieces]
    columns: list[int] = []
    lo = 0
    for name, width in widths:
        columns += range(lo, lo + width) if name in part else ()
        lo += width
    return columns
