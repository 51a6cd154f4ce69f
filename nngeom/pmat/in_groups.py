"""Diagonal blocks of Kronecker factors: outputs and inputs in groups, each with a factor of its own.

A block ``[1, o, i]`` becomes ``[b c, o / b, i / c]`` of ``b`` groups of outputs and ``c`` of inputs, group of outputs
first. Where inputs are grouped each parameter is a block of its own: a bias is one input more than fits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from nngeom.core.errors import StructureError
from nngeom.core.factored import FactoredJacobian
from nngeom.core.head import HeadJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Arrangement, Layout, Piece
from nngeom.core.linalg import Basis
from nngeom.core.output_metric import PartMetric
from nngeom.core.statistic import Inputs
from nngeom.pmat.factors import Factors, of_columns, of_gradients, of_inputs

Rows = FactoredJacobian | HeadJacobian


def in_groups(layout: Layout, outputs: int, inputs: int = 1) -> Layout:
    """The layout with its outputs and inputs in so many groups; several groups of inputs of one parameter only.

    Raises :class:`StructureError` where an order of axes does not let them.
    """
    pieces = (replace(piece, arrangement=_arranged(piece, outputs, inputs)) for piece in layout.pieces)
    return Layout(tuple(pieces))


def _arranged(piece: Piece, outputs: int, inputs: int) -> Arrangement:
    _, o, i = piece.arrangement.sizes
    sizes = outputs * inputs, o // outputs, i // inputs
    if inputs == 1:
        return replace(piece.arrangement, sizes=sizes)
    plain = piece.arrangement.is_plain()
    view, order = ((1, o, i), (0, 1, 2)) if plain else (piece.arrangement.view, piece.arrangement.order)
    axes = [(view[axis], axis) for axis in order]  # (size, place in the parameter), in the order of reading
    behind = next(m for m in range(len(axes) + 1) if math.prod(size for size, _ in axes[m:]) == i)
    halves = _split(axes[:behind], outputs, piece), _split(axes[behind:], inputs, piece)
    parts = [half[0] for half in halves] + [part for half in halves for part in half[1:]]
    places = sorted(parts, key=lambda part: part[1:])
    return Arrangement(tuple(p[0] for p in places), tuple(places.index(p) for p in parts), sizes)


def _split(axes: list[tuple[int, int]], groups: int, piece: Piece) -> list[tuple[int, int, int]]:
    """``(size, place, half)`` of the groups, and of what is left of the axes."""
    first = next((m for m, (size, _) in enumerate(axes) if size > 1), 0)
    size, place = axes[first] if axes else (1, -1)
    if size % groups:
        raise StructureError(
            f"the axes of parameter {piece.names[0]!r} do not fall into {groups} groups; raise factor_limit, or use "
            "factor_form='diagonal'"
        )
    others = [(s, at, 0) for m, (s, at) in enumerate(axes) if m != first]
    return [(groups, place, 0), (size // groups, place, 1), *others]


def groups_of(part: Layout, outputs: int) -> tuple[int, int]:
    """How many groups of all ``outputs`` and of its inputs a ``part`` of a layout has."""
    s, o, _ = part.sizes
    return outputs // o, s // (outputs // o)


def parts_among(layout: Layout, j: LayerJacobian, given: Iterable[Layout]) -> tuple[Layout, ...]:
    """Those of the ``given`` layouts that are the layout of the rows ``j`` in groups; none where they are not all of
    it.
    """
    found = tuple(given)
    s, outputs, _ = layout.sizes
    whole = [name for part in found for name in part.names] == list(layout.names)
    if not whole or s != 1 or not isinstance(j, Rows) or any(outputs % part.sizes[1] for part in found):
        return ()
    for part in found:
        pieces = tuple(piece for piece in layout.pieces if set(piece.names) <= set(part.names))
        if part != in_groups(Layout(pieces), *groups_of(part, outputs)):
            return ()
    return found


def inputs_of(layout: Layout, part: Layout) -> slice:
    """Which inputs of a layout those of a part are."""
    sizes = [(piece.names, piece.arrangement.sizes[2]) for piece in layout.pieces]
    first = [names for names, _ in sizes].index(part.pieces[0].names)
    lo = sum(i for _, i in sizes[:first])
    return slice(lo, lo + sum(i for _, i in sizes[first : first + len(part.pieces)]))


def factors_in_groups(layout: Layout, part: Layout, j: Rows, sharing: str, limit: int) -> Factors:
    """``"a" [c, i / c, i / c]`` and ``"g" [b, o / b, o / b]`` of the rows of a layout, for a part of it."""
    (outputs, inputs), here = groups_of(part, j.shape[3]), inputs_of(layout, part)
    a = Inputs(lambda: of_inputs(j.a[:, :, 0, here].unflatten(-1, (inputs, -1)), sharing, limit, j.share))
    if isinstance(j, FactoredJacobian):
        g = j.g[:, :, :, 0].unflatten(-1, (outputs, -1))
        return {"a": a, "g": of_gradients(g, sharing, limit, j.share)}
    heads = (_of_head(j, j.a, lo, hi) for lo, hi in _ranges(0, j.shape[3], outputs))
    return {"a": a, "g": torch.cat([of_columns(head, sharing, limit) for head in heads])}


def squares_in_groups(layout: Layout, part: Layout, j: Rows, ua: Basis | None, ug: Basis | None) -> Tensor:
    """``[b c, o / b, i / c]``: the sums of squares of the rows of a layout, for a part of it, in bases of its
    groups.
    """
    (outputs, inputs), here = groups_of(part, j.shape[3]), inputs_of(layout, part)
    bases = ([u[s : s + 1] if isinstance(u, Tensor) else None for s in range(outputs * inputs)] for u in (ua, ug))
    ranges = itertools.product(_ranges(0, j.shape[3], outputs), _ranges(here.start, here.stop, inputs))
    groups = (_group(j, *out, slice(*columns)) for out, columns in ranges)
    return torch.cat([group.rotate(a, g).square() for group, a, g in zip(groups, *bases)])


def _group(j: Rows, lo: int, hi: int, inputs: slice) -> LayerJacobian:
    """Rows of the outputs ``lo`` to ``hi`` and of some inputs."""
    a = j.a[..., inputs]
    return FactoredJacobian(a, j.g[..., lo:hi]) if isinstance(j, FactoredJacobian) else _of_head(j, a, lo, hi)


def _of_head(j: HeadJacobian, a: Tensor, lo: int, hi: int) -> HeadJacobian:
    return HeadJacobian(a, PartMetric(j.metric, lo, hi), lambda: j.make()[..., lo:hi], j.count)


def _ranges(start: int, stop: int, count: int) -> list[tuple[int, int]]:
    size = (stop - start) // count
    return [(lo, lo + size) for lo in range(start, stop, size)]
