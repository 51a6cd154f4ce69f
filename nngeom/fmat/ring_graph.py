"""Kernels over several processes that keep their graph: each holds that of the tiles it makes.

A kernel is the sum of what the processes put into it, tiles and mirror images, so its gradient is that of the tiles,
added up over processes: the backward pass is one reduction of as many numbers as the model has parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import UnsupportedError
from nngeom.fmat.places import Places
from nngeom.fmat.products import Grouping, products, squared_norms
from nngeom.fmat.ring import Tiles, require_room
from nngeom.fmat.side import Side
from nngeom.fmat.store import Store
from nngeom.fmat.visits import first_half, has_examples, on, parts, piece_of, shifted, visiting
from nngeom.pmat.metric import Metric
from nngeom.ranks.totals import totals

Place = tuple[slice, ...]


def differentiable_kernels(
    kind: Any,
    rows: Side,
    columns: Side | None,
    grouping: Grouping,
    *,
    centered: bool = False,
    metric: Metric | None = None,
) -> dict[str, Any]:
    """``{group: kernel}`` as :func:`~nngeom.fmat.ring.gathered_kernels`, whose backward pass all processes run
    together: the gradient is that of one process, the same on all.

    Raises :class:`UnsupportedError` for kernels that are centred
    by a mean gradient of all processes, and where a graph ends in what is no parameter of the model.
    """
    if centered and (kind.diagonal or columns is not None):
        raise UnsupportedError(
            "differentiable=True with centered=True over several processes is of square kernels: elsewhere the mean "
            "gradient of all processes is subtracted, which keeps no graph; leave centered= out"
        )
    places = Places.of(rows)
    across = places if columns is None else Places.of(columns)
    require_room(kind, rows, columns, (places, across))
    kept = rows.kept
    if centered:
        rows = rows.widened()
    how = {"explicit": not centered and metric is None, "on_disk": False}
    rows, columns = rows.for_tiles(**how), columns if columns is None else columns.for_tiles(**how)
    ring = Ring(kind, grouping, (places, across), metric)
    if kind.diagonal:
        made = ring.diagonal(rows)
    else:
        made = ring.square(rows) if columns is None else ring.between(rows, columns)
    graph = Graph.of(ring, rows, made)
    found = dict(zip(grouping.names, _Whole.apply(graph, *graph.parameters)))
    return {name: kind((kind.doubly_centred(t) if centered else t).to(kept)) for name, t in found.items()}


@dataclass(frozen=True)
class Made:
    """What a process made of a kernel: ``tiles`` of all groups at a ``place``, and mirrored at another if there is
    one.
    """

    tiles: Tiles
    place: Place
    mirror: Place | None = None


@dataclass(frozen=True)
class Ring:
    """A kernel of a ``kind`` over the examples of all processes, ``places`` of the rows and of the columns."""

    kind: Any
    grouping: Grouping
    places: tuple[Places, Places]
    metric: Metric | None

    def diagonal(self, rows: Side) -> list[Made]:
        """The squared norms of this process's examples."""
        own = self.places[0]
        with own.team.together("kernel"):
            if not rows.examples:
                return []
            return [Made(squared_norms(rows, self.grouping, None, self.metric), (slice(0, own.outputs), own.mine))]

    def square(self, rows: Side) -> list[Made]:
        """The tiles of a square kernel that this process makes: of every pair of processes one."""
        own = self.places[0]
        team, n = own.team, own.counts
        made: list[Made] = []
        with team.together("kernel") as note:
            note.mine = first_half(rows)
            if rows.examples:
                made.append(self._made(rows, None, (own.mine, own.mine)))
        for step, batches in enumerate(visiting(team, rows, team.size // 2), 1):
            source = (team.rank - step) % team.size
            piece = piece_of(n, note.all, team.rank, source)
            with team.together("kernel"):
                left, right = parts(rows, batches, piece, n)
                if has_examples(left, right, piece):
                    at = shifted(piece[0], own.mine), shifted(piece[1], own.of_rank(source))
                    made.append(self._made(left, right, at, mirrored=True))
        return made

    def between(self, rows: Side, columns: Side) -> list[Made]:
        """The rows of this process's examples, tile by tile."""
        own, across = self.places
        team, made = own.team, list[Made]()
        with team.together("kernel"):
            if rows.examples and columns.examples:
                made.append(self._made(rows, columns, (own.mine, across.mine)))
        for step, batches in enumerate(visiting(team, columns, team.size - 1), 1):
            source = (team.rank - step) % team.size
            with team.together("kernel"):
                if rows.examples and across.counts[source]:
                    made.append(self._made(rows, on(columns, batches), (own.mine, across.of_rank(source))))
        return made

    def _made(self, left: Side, right: Side | None, at: tuple[slice, slice], *, mirrored: bool = False) -> Made:
        store = Store(self.grouping.names, graph=True)
        tiles = products(self.kind, left, right, self.grouping, store, metric=self.metric)
        k = slice(0, self.places[0].outputs)
        place, mirror = self.kind.place(k, at[0], k, at[1]), self.kind.place(k, at[1], k, at[0])
        return Made(tiles, place, mirror if mirrored else None)

    def empty(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Whole kernels, zero."""
        own, across = self.places
        if self.kind.diagonal:
            shape: tuple[int, ...] = (own.outputs, own.total)
        else:
            shape = self.kind.sizes(own.outputs, own.total, across.total)
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name in self.grouping.names}


@dataclass(frozen=True)
class Graph:
    """The kernels of a ``ring`` as functions of the ``parameters``: the tiles that this process ``made``, and empty
    kernels, ``like`` which they are; ``used``: which parameters some process's tiles depend on.
    """

    ring: Ring
    made: list[Made]
    parameters: tuple[Tensor, ...]
    used: tuple[bool, ...]
    like: tuple[torch.dtype, torch.device]

    @staticmethod
    def of(ring: Ring, rows: Side, made: list[Made]) -> Graph:
        """Raises :class:`UnsupportedError` where tiles depend on tensors that are no parameters of the model, whose
        gradient would not arrive.
        """
        named = {name: p for name, p in rows.run.network.model.named_parameters() if p.requires_grad}
        with ring.places[0].team.together("graph") as note:
            ends = {id(x): x for x in leaves(t for piece in made for t in piece.tiles.values())}
            note.mine = {name for name, p in named.items() if id(p) in ends}
            known = set(map(id, named.values()))
            odd = [tuple(x.shape) for end, x in ends.items() if end not in known]
            if odd:
                raise UnsupportedError(
                    "differentiable=True over several processes gives the gradient of the model's parameters, and the "
                    f"kernel depends on tensors of shapes {odd[:4]} that require one and are none of them; detach "
                    "them, or register them in the model"
                )
        used = set[str]().union(*note.all)
        return Graph(
            ring, made, tuple(named.values()), tuple(name in used for name in named), (rows.dtype, rows.device)
        )

    def whole(self) -> tuple[Tensor, ...]:
        """The kernels, the same bits on all processes."""
        out = self.ring.empty(*self.like)
        for piece in self.made:
            for name, tile in piece.tiles.items():
                out[name][piece.place] = tile.detach().to(self.like[0])
                if piece.mirror is not None:
                    out[name][piece.mirror] = self.ring.kind.mirror(tile.detach()).to(self.like[0])
        self.ring.places[0].team.sum_(list(out.values()))
        return tuple(out.values())

    def gradients(self, given: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Of the parameters, for those ``given`` of the kernels: summed over processes, to which all give the same."""
        team, chosen = self.ring.places[0].team, [p for p, used in zip(self.parameters, self.used) if used]
        sums, _ = totals(team, "gradient of a kernel", lambda: (self._own(chosen, given), 1), given)
        found = iter(sums)
        return [next(found) if used else None for used in self.used]

    def _own(self, parameters: list[Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
        tiles, cotangents = [], []
        for piece in self.made:
            for name, g in zip(self.ring.grouping.names, given):
                tile = piece.tiles[name]
                if tile.requires_grad:
                    mirrored = 0.0 if piece.mirror is None else self.ring.kind.mirror(g[piece.mirror])
                    tiles.append(tile)
                    cotangents.append((g[piece.place] + mirrored).to(tile.dtype))
        found: Any = [None] * len(parameters)
        if tiles:
            found = torch.autograd.grad(tiles, parameters, cotangents, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]


def leaves(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
    """What graphs end in: the tensors that would be given a ``.grad``."""
    left = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(left)
    while left:
        node: Any = left.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                left.append(other)


class _Whole(torch.autograd.Function):
    """The kernels as a function of the parameters."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        return graph.whole()

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "a kernel over several processes is differentiable once; expected a backward pass without "
                "create_graph=True, or the kernel of one process"
            )
        return None, *ctx.graph.gradients(given)
