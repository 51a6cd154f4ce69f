"""What a statistic calls its blocks, as plain values for files, and back."""

from __future__ import annotations

from typing import Any

from nngeom.core.errors import UnsupportedError
from nngeom.core.layout import Arrangement, Layout, Piece


def plain(block: Any) -> Any:
    """For JSON; raises :class:`UnsupportedError` for what is no Layout, name, number or tuple of these."""
    if isinstance(block, tuple):
        return {"tuple": [plain(x) for x in block]}
    if isinstance(block, Layout):
        return {"layout": [_piece(p) for p in block.pieces]}
    if block is None or isinstance(block, (str, bool, int)):
        return block
    raise UnsupportedError(
        f"a statistic calls a block {block!r}, by which a file does not know it; expected a Layout, a name, a number "
        "or a tuple of these"
    )


def _piece(p: Piece) -> list[Any]:
    a = p.arrangement
    return [list(p.names), p.offset, list(a.view), list(a.order), list(a.sizes), a.window]


def block_of(x: Any) -> Any:
    """The inverse of :func:`plain`."""
    if not isinstance(x, dict):
        return x
    if "tuple" in x:
        return tuple(map(block_of, x["tuple"]))
    pieces = []
    for names, offset, view, order, sizes, window in x["layout"]:
        s, o, i = sizes
        pieces.append(Piece(tuple(names), offset, Arrangement(tuple(view), tuple(order), (s, o, i), window)))
    return Layout(tuple(pieces))
