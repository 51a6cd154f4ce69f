"""Kernels tile by tile: pairs of chunks of examples and outputs, each captured once a tile row, the symmetric half
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from nngeom.core.errors import NonFiniteError
from nngeom.core.finite import all_finite
from nngeom.core.jacobian import FullJacobian, LayerJacobian
from nngeom.core.layout import Layout
from nngeom.fmat.side import Side
from nngeom.sweep.sweep import Chunk


def require_finite(results: Iterable[torch.Tensor], *sides: Side | None) -> None:
    """Raise :class:`NonFiniteError` if results of rows are not finite, naming batch and examples where gradients are
    not. Where these were searched, inputs of layers may be infinite all the same.
    """
    if all_finite(list(results)):
        return
    for side in sides:
        if side is not None:
            side.sweep.raise_where_not_finite()
    raise NonFiniteError(
        "products of gradients overflowed to NaN or infinity; check the inputs (of layers, too), scale the outputs, or "
        "use a wider dtype, model.double()"
    )


def pairs(rows: Side, columns: Side | None) -> Iterator[tuple[Chunk, Chunk]]:
    """All pairs of chunks; with ``columns=None`` those on and above the diagonal of a square kernel."""
    for group in rows.groups():
        if columns is None:
            for j, x in enumerate(group.chunks):
                yield from ((x, y) for y in group.chunks[j:])
        for right in columns.groups() if columns is not None else rows.groups(after=group.last):
            yield from ((x, y) for x in group.chunks for y in right.chunks)


def matched(x: Chunk, y: Chunk, layer_of: Callable[[str], str]) -> Iterator[tuple[str, LayerJacobian, LayerJacobian]]:
    """``(layer, J, J')`` for every block; parameters that the two chunks group differently are paired as explicit
    rows.
    """
    common = [layout for layout in x.jacobians if layout in y.jacobians]
    for layout in common:
        yield layer_of(layout.names[0]), x.jacobians[layout], y.jacobians[layout]
    left, right = ({lay: j for lay, j in c.jacobians.items() if lay not in common} for c in (x, y))
    both = {name for lay in left for name in lay.names} & {name for lay in right for name in lay.names}
    for name in sorted(both):
        yield layer_of(name), _explicit(left, name), _explicit(right, name)


def _explicit(jacobians: Mapping[Layout, LayerJacobian], name: str) -> FullJacobian:
    """The rows of one parameter, in its own order."""
    layout = next(lay for lay in jacobians if name in lay.names)
    column = 0
    for piece in layout.pieces:
        i = piece.arrangement.sizes[2]
        if name in piece.names:
            break
        column += i
    rows = piece.arrangement.write(jacobians[layout].matrix()[..., column : column + i])
    return FullJacobian(rows[:, :, None, None])
