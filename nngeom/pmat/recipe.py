"""What a representation averages: a generator that yields statistics and is sent their means.

A recipe yields one statistic a sweep, a function ``chunk -> {block: {name: sum over the chunk}}``, receives the means
over all examples, and returns ``{layout: block}``. Recipes never touch a network; they see LayerJacobians.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nngeom.core import memory
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.parts import write_columns, writes_columns
from nngeom.core.statistic import Named
from nngeom.ranks.team import ALONE, Team
from nngeom.space.collection import LayerCollection
from nngeom.sweep.sweep import Chunk

Means = dict[Any, dict[str, Tensor]]
Statistic = Callable[[Chunk], Named]
Recipe = Generator[Statistic, Means, dict[Layout, Any]]


@dataclass(frozen=True)
class Selection:
    """The parameters a recipe is responsible for: those called ``names`` of a ``collection``; ``team``: the processes
    that run it, all on the same means.
    """

    collection: LayerCollection
    names: tuple[str, ...]
    team: Team = ALONE

    @staticmethod
    def of(collection: LayerCollection, team: Team = ALONE) -> Selection:
        """All parameters of a ``collection``, for a ``team`` of processes."""
        return Selection(collection, collection.names, team)

    def span(self) -> Layout:
        """All of them as one flat block."""
        return self.collection.span(self.names)

    def by_layer(self) -> dict[str, tuple[str, ...]]:
        """``layer -> its parameters`` within the selection."""
        mine = set(self.names)
        table = {layer: tuple(n for n in names if n in mine) for layer, names in self.collection.by_layer().items()}
        return {layer: names for layer, names in table.items() if names}

    def numel(self, beside: str | None = None) -> int:
        """Number of entries of all of them, or of those in the layer of the parameter called ``beside``."""
        c, mine = self.collection, set(self.names)
        layer = None if beside is None else c.layers[c.names.index(beside)]
        named = zip(c.names, c.shapes, c.layers)
        return sum(math.prod(shape) for name, shape, of in named if name in mine and layer in (None, of))

    def restrict(self, chunk: Chunk) -> Chunk:
        """The LayerJacobians of these parameters only, of those of a ``chunk``."""
        if len(self.names) == len(self.collection):
            return chunk
        mine = set(self.names)
        return replace(chunk, jacobians={lay: j for lay, j in chunk.jacobians.items() if mine.issuperset(lay.names)})


def join_rows(chunk: Chunk, layout: Layout, names: tuple[str, ...]) -> Iterator[Tensor]:
    """Explicit rows ``[k, n, p]`` of a ``chunk`` over the ``layout`` of whole parameters, those called ``names``, in
    pieces of examples that fit the memory budget.
    """
    mine = set(names)
    members = [(lay, j) for lay, j in chunk.jacobians.items() if mine.intersection(lay.names)]
    if not members:
        return
    k, n = members[0][1].shape[:2]
    dtype = functools.reduce(torch.promote_types, (j.dtype for _, j in members))
    place: dict[str, int] = {}
    at = 0
    for piece in layout.pieces:
        for name in piece.names:
            place.setdefault(name, at - piece.offset)
        at += piece.stop - piece.offset
    for lo, hi in memory.pieces(n, 2 * k * layout.numel * dtype.itemsize, "example and all its outputs"):
        rows = torch.zeros(k, hi - lo, layout.numel, dtype=dtype, device=members[0][1].device)
        for lay, j in members:
            write_rows(rows, j.examples(lo, hi), lay, place)
        yield rows


def write_rows(out: Tensor, j: LayerJacobian, layout: Layout, shift: dict[str, int] | None = None) -> None:
    """Write the rows of one block at their places in ``out [k, n, d]``; ``shift`` moves each parameter's offset."""
    j = j if j.dtype == out.dtype else j.to(out.dtype)
    direct, column = writes_columns(j) and all(p.arrangement.is_plain() for p in layout.pieces), 0
    m = None if direct else j.matrix()
    for piece in layout.pieces:
        i = piece.arrangement.sizes[2]
        move = shift[piece.names[0]] if shift is not None else 0
        target = out[..., piece.offset + move : piece.stop + move]
        plain = piece.arrangement.is_plain()
        if m is None and plain:
            write_columns(j, target.view(*target.shape[:-1], *piece.arrangement.sizes), column, column + i)
        else:
            part = (j.matrix() if m is None else m)[..., column : column + i]
            if plain:
                target.view(*target.shape[:-1], *piece.arrangement.sizes).copy_(part)
            else:
                target.copy_(piece.arrangement.write(part))
        column += i


def run_together(recipes: list[tuple[Selection, Recipe]]) -> Recipe:
    """Several recipes over disjoint scopes in the same sweeps."""
    waiting: dict[int, Statistic] = {}
    done: dict[Layout, Any] = {}
    for j, (_, recipe) in enumerate(recipes):
        try:
            waiting[j] = next(recipe)
        except StopIteration as end:
            done.update(end.value)
    while waiting:
        current = dict(waiting)

        def statistic(chunk: Chunk, current: dict[int, Statistic] = current) -> Named:
            return {(j, block): t for j, f in current.items() for block, t in f(recipes[j][0].restrict(chunk)).items()}

        means = yield statistic
        waiting = {}
        for j in current:
            mine = {block: t for (owner, block), t in means.items() if owner == j}
            try:
                waiting[j] = recipes[j][1].send(mine)
            except StopIteration as end:
                done.update(end.value)
    return done
