"""Products of all pairs of rows, added up layer by layer without keeping any layer's rows, and how rows are cut for it.

Three ways, the cheapest by count:

* no positions: ``(a a^T) * (g g^T)``;
* pairs of positions: ``sum_tu (a_t . a_u) (g_t . g_u)``, inputs against inputs, then gradients ``g_u``, then ``g_t``;
* rows: a block of the rows ``[o, i]`` at a time, small enough to stay in a processor cache.

Any rows can be multiplied; what is registered for a type of them is only cheaper.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from nngeom.core import contract, costs, memory
from nngeom.core.factored import FactoredJacobian, LookupJacobian
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.parts import cuts_inputs, features, inputs
from nngeom.core.tile import Tile


def add(tile: Tile, x: LayerJacobian, y: LayerJacobian) -> None:
    """``tile.out[k, n, l, m] += <x[k, n], y[l, m]>`` in place; in the widest dtype of all blocks so far."""
    tile.widen(torch.promote_types(x.dtype, y.dtype))
    wide = tile.flat.dtype
    if not x.dtype == y.dtype == wide:
        x, y = (x.to(wide),) * 2 if x is y else (x.to(wide), y.to(wide))
    add_products(x, tile, y)


@functools.singledispatch
def add_products(x: LayerJacobian, tile: Tile, y: LayerJacobian) -> None:
    """The cheapest way for the left rows ``x``, all in the dtype of the tile."""
    by_rows(tile, x, y)


@add_products.register
def _(x: FactoredJacobian, tile: Tile, y: LayerJacobian) -> None:
    if not isinstance(y, FactoredJacobian):
        by_rows(tile, x, y)
    elif x.positions == y.positions == 1:
        without_positions(tile, x, y)
    elif costs.products_by_positions(x.g.shape, y.g.shape, x.shape[-1], x.compared, same=x is y):
        by_positions(tile, x, y)
    else:
        by_rows(tile, x, y)


def by_rows(tile: Tile, x: LayerJacobian, y: LayerJacobian) -> None:
    """Explicit rows of both sides, a block of the parameters of the layer at a time."""
    if x is y:
        for part in _blocks(x, x):
            own = rows(part, tile, "left")
            tile.add(own, own)
    else:
        for left, right in zip(_blocks(x, y), _blocks(y, x)):
            tile.add(rows(left, tile, "left"), rows(right, tile, "right"))


def _blocks(x: LayerJacobian, y: LayerJacobian) -> Iterator[LayerJacobian]:
    """``x`` cut over its parameters so that a block of the rows of both takes :data:`costs.SLICE_BYTES`."""
    (k, n, s, o, i), height = x.shape, x.shape[2] if x.shape[2] > 1 else x.shape[3]
    count = n * k + (0 if x is y else y.shape[0] * y.shape[1])
    most = min(costs.SLICE_BYTES, memory.budget() // 4) // (count * x.dtype.itemsize)
    across = s == 1 and cuts_inputs(x) and cuts_inputs(y)
    step, width = costs.block(s, o, i, most, across=across)
    for lo in range(0, height, step):
        part = features(x, lo, min(height, lo + step))
        for first in range(0, i, width):
            yield part if width == i else inputs(part, first, min(i, first + width))


def without_positions(tile: Tile, x: FactoredJacobian, y: FactoredJacobian) -> None:
    """``sum_s (a a^T) * (g g^T)``: no rows at all."""
    for s in range(x.g.shape[3]):
        tile.add_scaled(x.g[:, :, 0, s], y.g[:, :, 0, s], x.input_gram(y, s)[:, 0, :, 0])


def by_positions(tile: Tile, x: FactoredJacobian, y: FactoredJacobian) -> None:
    """``sum_s,t,u (a_t . a_u) (g_t . g_u)``, a block of the right side at a time against one example of the left after
    the other.
    """
    (_, n, t, groups, o), (l, m, u, _, _) = x.g.shape, y.g.shape
    most = min(costs.SLICE_BYTES, memory.budget()) // 4
    size = memory.step(m, l * o * t * x.dtype.itemsize, most=most)
    across = memory.step(n, size * t * u * x.dtype.itemsize, most=most)
    empty = functools.partial(tile.working, "mixed")
    for s, lo in itertools.product(range(groups), range(0, m, size)):
        hi = min(m, lo + size)
        right = y.examples(lo, hi)
        h = right.right_side(s)
        for j in range(hi if x is y else n):  # pairs of examples once
            first, place = max(lo, j) if x is y else lo, j % across
            if not place:
                inner = right.input_gram(x.examples(j, min(n, j + across)), s)  # [m u n t]
            g = x.examples(j, j + 1).left_side(s)
            part = contract.products(g, inner[first - lo :, :, place : place + 1], h[first - lo :], empty)[0]
            part = part.transpose(1, 2)  # [k l m]
            tile.out[:, j, :, first:hi] += part
            if x is y and not tile.by_examples:  # the mirror image belongs above the diagonal too
                later = max(first, j + 1)
                tile.out[:, later:hi, :, j] += part[:, :, later - first :].permute(1, 2, 0)


@functools.singledispatch
def rows(j: LayerJacobian, tile: Tile, name: str) -> Tensor:
    """``[r, p]``: the rows in the order of a tile, in its working memory of this name where that saves fresh memory."""
    return tile.rows(j.matrix())


@rows.register
def _(j: LookupJacobian, tile: Tile, name: str) -> Tensor:
    return tile.rows(j.matrix())


@rows.register
def _(j: FactoredJacobian, tile: Tile, name: str) -> Tensor:
    k, n, t, s, o = j.g.shape
    if s > 1:
        return tile.rows(j.matrix())
    out = tile.working(name, *((n, k) if tile.by_examples else (k, n)), o, j.a.shape[-1])
    own = out.transpose(0, 1) if tile.by_examples else out
    if t == 1:
        torch.mul(j.g[:, :, 0, 0].unsqueeze(-1), j.a[:, 0, 0].unsqueeze(-2), out=own)
    elif tile.by_examples:
        torch.bmm(_stacked(j.g, tile, name).mT, j.a[:, :, 0], out=out.view(n, k * o, -1))
    else:
        for g, part in zip(j.g, own):
            torch.bmm(g[:, :, 0].mT, j.a[:, :, 0], out=part)
    return out.view(k * n, -1)


def _stacked(g: Tensor, tile: Tile, name: str) -> Tensor:
    """``[n, t, (k o)]``: the output gradients of all cotangents side by side, a copy where they do not lie so."""
    g = g[:, :, :, 0].permute(1, 2, 0, 3)
    n, t, k, o = g.shape
    if g.stride(2) != o * g.stride(3):
        name = f"{name} gradients"
        if g.stride(3) == 1:
            copy = tile.working(name, n, t, k, o)
        else:
            copy = tile.working(name, n, k, o, t).permute(0, 3, 1, 2)
        g = copy.copy_(g)
    return g.flatten(2)
