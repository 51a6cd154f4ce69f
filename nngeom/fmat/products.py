"""What kernels are made of: products and squared norms of gradients over tiles, and mean gradients to centre them.

A kernel in a metric, ``J M J'^T``, has the products and norms of that metric in their place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.bars import tqdm
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout
from nngeom.core.paired import paired
from nngeom.core.parts import has_positions
from nngeom.core.totals import totals
from nngeom.fmat.chunks import span
from nngeom.fmat.side import OneBatch, Side
from nngeom.fmat.store import Store
from nngeom.fmat.tiles import matched, pairs, require_finite
from nngeom.pmat.metric import Metric
from nngeom.sweep.sweep import Chunk


@dataclass(frozen=True)
class Grouping:
    """Which kernel a block contributes to: one for all parameters (``""``), or one a layer."""

    names: tuple[str, ...]
    of: Callable[[str], str]

    def layout(self, layout: Layout) -> str:
        """The group of a block."""
        return self.of(layout.names[0])


EVERYTHING = Grouping(("",), lambda name: "")


def build(
    kind: Any,
    rows: Side,
    columns: Side | None,
    grouping: Grouping,
    *,
    centered: bool = False,
    metric: Metric | None = None,
    store: Store | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """``{group: kernel}`` in a representation. Square kernels in memory are centred at the end, others tile by tile."""
    kept = rows.kept
    if centered:
        rows, columns = rows.widened(), columns.widened() if columns is not None else None
    if kind.diagonal:
        return {
            name: kind(t.to(kept))
            for name, t in squared_norms(rows, grouping, Mean.over(rows, metric) if centered else None, metric).items()
        }
    explicit = not centered and metric is None
    rows = rows.for_tiles(explicit=explicit, on_disk=store is not None)
    if columns is not None:
        columns = columns.for_tiles(explicit=explicit, on_disk=store is not None)
    late = centered and columns is None and store is None
    store = store or Store(grouping.names, graph=rows.sweep.policy.keep_graph)
    mean = Mean.over(rows, metric) if centered and not late else None
    tensors = products(kind, rows, columns, grouping, store, mean=mean, metric=metric, progress=progress)
    return {name: kind((kind.doubly_centred(t) if late else t).to(kept)) for name, t in tensors.items()}


def squared_norms(
    rows: Side, grouping: Grouping, mean: Mean | None = None, metric: Metric | None = None
) -> dict[str, Tensor]:
    """``{group: (c, n)}``: the squared norms of the (centred) gradients, in a metric; no kernel is formed."""
    parts: dict[str, dict[int, list[Tensor]]] = {name: {} for name in grouping.names}
    for chunk in rows.chunks(reuse=True):
        k, _ = span(chunk)
        zero = torch.zeros(k.stop - k.start, chunk.examples, dtype=rows.dtype, device=rows.device)
        totals = dict.fromkeys(grouping.names, zero)
        for name, part in _norms(chunk, grouping, metric):
            totals[name] = totals[name] + part
        if mean is not None:
            for name, part in mean.shifts(chunk, grouping):
                totals[name] = totals[name] + part
        require_finite(totals.values(), rows)
        for name, t in totals.items():
            parts[name].setdefault(chunk.start, []).append(t)
    return {
        name: torch.cat([torch.cat(outputs) for outputs in examples.values()], 1) for name, examples in parts.items()
    }


def _norms(chunk: Chunk, grouping: Grouping, metric: Metric | None) -> Iterator[tuple[str, Tensor]]:
    """``(group, [k, n])`` that sum to the squared norms."""
    if metric is None:
        yield from ((grouping.layout(layout), j.squared_norms()) for layout, j in chunk.jacobians.items())
    else:
        halves = metric.pairs(chunk.jacobians, chunk.jacobians, grouping.of)
        yield from ((name, paired(left, right)) for name, left, right in halves)


@dataclass(frozen=True)
class Mean:
    """The mean gradient of every output over the examples of one side, ``flat (c, d)``, and ``times`` the metric."""

    flat: Tensor
    times: Tensor

    @staticmethod
    def over(side: Side, metric: Metric | None = None) -> Mean:
        """One sweep over the examples."""
        total: Tensor | None = None
        d = side.run.network.collection.numel
        for group in side.groups():
            for chunk in group.chunks:
                k, _ = span(chunk)
                if total is None:
                    total = torch.zeros(chunk.cotangents[1], d, dtype=side.dtype, device=side.device)
                part = torch.zeros(k.stop - k.start, d, dtype=side.dtype, device=side.device)
                for layout, j in chunk.jacobians.items():
                    layout.scatter_(part, totals(j).to(part))
                total[k] += part
        none = torch.zeros(0, d, dtype=side.dtype, device=side.device)
        flat = (none if total is None else total) / side.examples
        return Mean(flat, flat if metric is None else metric.times(flat))

    def products(self, chunk: Chunk, grouping: Grouping) -> dict[str, Tensor]:
        """``{group: [k, n, l]}``: every gradient of the chunk times the mean gradient of every output ``l``."""
        out: dict[str, Tensor] = {}
        for layout, j in chunk.jacobians.items():
            part = j.jvp(layout.gather(self.times).to(j.dtype)).permute(1, 2, 0)
            name = grouping.layout(layout)
            out[name] = out[name] + part if name in out else part
        return out

    def shifts(self, chunk: Chunk, grouping: Grouping) -> Iterator[tuple[str, Tensor]]:
        """``(group, [k, n])``: what centring adds to the squared norms, ``- 2 <x, mu_k> + <mu_k, mu_k>``."""
        k, _ = span(chunk)
        for layout, j in chunk.jacobians.items():
            to = [layout.gather(self.times[k.start + i]).to(j.dtype) for i in range(j.shape[0])]
            own = torch.stack([j.cotangents(i, i + 1).jvp(v)[0] for i, v in enumerate(to)])
            squares = layout.gather(self.flat[k] * self.times[k]).flatten(1).sum(1, keepdim=True)
            yield grouping.layout(layout), squares - 2 * own

    def squares(self, side: Side, grouping: Grouping) -> dict[str, Tensor]:
        """``{group: [k, l]}``: the products of the mean gradients with each other."""
        c = self.flat.shape[0]
        out = {name: self.flat.new_zeros(c, c) for name in grouping.names}
        for name, (lo, shape) in side.run.network.collection.offsets().items():
            here = slice(lo, lo + torch.Size(shape).numel())
            out[grouping.of(name)] = out[grouping.of(name)] + self.flat[:, here] @ self.times[:, here].T
        return out


def products(
    kind: Any,
    rows: Side,
    columns: Side | None,
    grouping: Grouping,
    store: Store,
    *,
    mean: Mean | None = None,
    metric: Metric | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """``{group: tensor}`` of a kernel representation, tile by tile; the lower half of a square kernel is mirrored.

    ``mean``: these gradients are subtracted on both sides, ``<x - mu_k, y - mu_l> = K - <x, mu_l> - <mu_k, y> + <mu_k,
    mu_l>``. ``metric``: products are in it.
    """
    m = (columns or rows).examples
    if columns is None and mean is None and metric is None and (one_batch := rows.one_batch()) is not None:
        return _of_one_batch(kind, rows, one_batch, grouping, store, progress=progress)
    squares = mean.squares(rows, grouping) if mean is not None else {}
    bar = tqdm(total=rows.examples * m, desc="GramMatrix", unit="pair", disable=not progress)
    for x, y in pairs(rows, columns):
        (k, n), (l, q) = span(x), span(y)
        place = kind.place(k, n, l, q)
        store.open(
            kind.sizes(x.cotangents[1], rows.examples, m), rows.dtype if mean is None else rows.kept, rows.device
        )
        if all(s.stop > s.start for s in place) and not store.has(place):
            if metric is None:
                blocks = list(matched(x, y, grouping.of))
            else:
                blocks = list(metric.pairs(x.jacobians, y.jacobians, grouping.of))
            by_examples = any(has_positions(j) for _, j, _ in blocks)
            tiles = kind.tiles(blocks, k, l, graph=store.graph, by_examples=by_examples)
            if mean is not None:
                left, right = mean.products(x, grouping), mean.products(y, grouping)
                zero = torch.zeros([s.stop - s.start for s in place], dtype=rows.dtype, device=rows.device)
                none = mean.flat.new_zeros(1, 1, 1)
                for name in grouping.names:
                    ax, ay = (
                        a.get(name, none.expand(s.stop - s.start, e.stop - e.start, x.cotangents[1]))
                        for a, s, e in ((left, k, n), (right, l, q))
                    )
                    tiles[name] = kind.centred(tiles.get(name, zero), ax, ay, squares[name], k, l)
            if metric is not None and columns is None and x is y:
                tiles = {name: (tile + kind.mirror(tile)) / 2 for name, tile in tiles.items()}
            require_finite(tiles.values(), rows, columns)
            mirror = kind.place(l, q, k, n) if columns is None and x is not y else None
            store.write(place, tiles, mirror, kind.mirror)
        share = (k.stop - k.start) * (l.stop - l.start) / x.cotangents[1] ** 2
        bar.update(share * (n.stop - n.start) * (q.stop - q.start) * (2 if columns is None and x is not y else 1))
    bar.close()
    return store.result()


def _of_one_batch(
    kind: Any, rows: Side, one_batch: OneBatch, grouping: Grouping, store: Store, *, progress: bool
) -> dict[str, Tensor]:
    """A square kernel as one tile, summed over blocks as they come."""
    n, c = slice(0, rows.examples), slice(0, one_batch.outputs)
    place = kind.place(c, n, c, n)
    store.open(kind.sizes(c.stop, n.stop, n.stop), rows.dtype, rows.device)
    if not store.has(place):
        blocks = _released(one_batch.parts, grouping, progress=progress)
        tiles = kind.tiles(blocks, c, c, graph=False, by_examples=one_batch.positions)
        require_finite(tiles.values(), rows)
        store.write(place, tiles, None, kind.mirror)
    return store.result()


def _released(
    parts: Iterator[dict[Layout, LayerJacobian]], grouping: Grouping, *, progress: bool
) -> Iterator[tuple[str, LayerJacobian, LayerJacobian]]:
    """The blocks of all parts, none of them held any longer when the next is made."""
    with tqdm(desc="GramMatrix", unit="layer") if progress else contextlib.nullcontext() as bar:
        for part in parts:
            while part:
                layout, j = part.popitem()
                yield grouping.layout(layout), j, j
                del j
                if bar is not None:
                    bar.update()
