"""Products with the Jacobian of the examples along one axis of a kernel, ``J v`` and ``J^T u``: nothing stored."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core import memory
from nngeom.core.linalg import flat_rows
from nngeom.core.linear import linear
from nngeom.fmat.chunks import span
from nngeom.fmat.passes import passed
from nngeom.fmat.side import Side
from nngeom.pmat.tangents import at_once_or_not, tangents_or_rows, times_rows
from nngeom.pullback.backward import pull_back
from nngeom.pullback.linearization import Linearization
from nngeom.pullback.many_tangents import ManyTangents
from nngeom.ranks.fingerprint import bits
from nngeom.ranks.totals import require_same_vectors, totals
from nngeom.space.pvector import PVector


def push(side: Side, v: Tensor) -> Tensor:
    """``J v``: ``[*b, d] -> [*b, c, n]``, by tangents or by rows; differentiable in ``v``."""
    return linear(lambda x: _pushed(side, x), lambda u: _pulled(side, u), v, side.parameters)


def pull(side: Side, u: Tensor) -> Tensor:
    """``J^T u``: ``[*b, c, n] -> [*b, d]``, differentiable in ``u``.

    One forward pass a batch, unless it was kept (:func:`kept_passes`), and one backward pass for all vectors that fit
    the budget.
    """
    return linear(lambda x: _pulled(side, x), lambda v: _pushed(side, v), u, side.parameters)


def _pushed(side: Side, v: Tensor) -> Tensor:
    """Of the examples of all processes, where the side goes over these."""
    places, shape = side.places, (*v.shape[:-1], side.outputs)
    if places is None:
        return _push(side, v)
    with side.within(), places.team.together("product") as note:
        pushed = _push(side, v) if side.sizes else v.new_zeros(*shape, 0)
        note.mine = bits([v])
    require_same_vectors("product", note.all)
    return places.whole(pushed.flatten(0, -2)).view(*shape, places.total)


def _pulled(side: Side, u: Tensor) -> Tensor:
    """From the examples of all processes, where the side goes over these."""
    places = side.places
    if places is None:
        return _pull(side, u)
    with side.within():
        none = u.new_zeros(*u.shape[:-2], side.run.network.collection.numel)
        local = lambda: ([_pull(side, u[..., places.mine]) if side.sizes else none], side.examples)
        return totals(places.team, "product", local, [u])[0][0]


def _push(side: Side, v: Tensor) -> Tensor:
    flat = v.reshape(-1, v.shape[-1])
    with side.within():
        if not len(flat):
            return v.new_zeros(*v.shape[:-1], side.outputs, side.examples)
        one_by_one = lambda: tangents_or_rows(lambda: _by_tangents(side, flat), lambda: _by_rows(side, flat))
        pushed = at_once_or_not(lambda: _at_once(side, flat), one_by_one) if len(flat) > 1 else one_by_one()
    return pushed.view(*v.shape[:-1], *pushed.shape[1:])


def _at_once(side: Side, v: Tensor) -> Tensor:
    """``[b, d] -> [b, c, n]``, all vectors through one graph a batch."""
    parts = []
    for batch in side.run.loader:
        tangents = ManyTangents.of(side.run.network, batch)
        tangents.require_right()
        pushed = [tangents.push(v[lo:hi]) for lo, hi in tangents.pieces(len(v))]
        parts.append(torch.cat(pushed).flatten(2).transpose(1, 2).to(v.dtype))
    return torch.cat(parts, 2)


def _by_tangents(side: Side, v: Tensor) -> Tensor:
    """``[b, d] -> [b, c, n]``."""
    network = side.run.network
    linearization, rows = Linearization(network), []
    for x in v:
        named = PVector(network.collection, x)
        tangents = {name: named[name].to(p.dtype) for name, p in network.parameters.items()}
        pushed = [linearization.jvp(batch, tangents)[1].flatten(1).T for batch in side.run.loader]
        rows.append(torch.cat(pushed, 1).to(v.dtype))
    return torch.stack(rows)


def _by_rows(side: Side, v: Tensor) -> Tensor:
    """As :func:`_by_tangents`, from the rows as every stored representation has them."""
    out = v.new_zeros(len(v), side.outputs, side.examples)
    for chunk in side.chunks(reuse=True):
        k, n = span(chunk)
        out[:, k, n] = times_rows(chunk, v)
    return out


def _pull(side: Side, u: Tensor) -> Tensor:
    network, flat = side.run.network, u.reshape(-1, *u.shape[-2:])
    total = torch.zeros(flat.shape[0], network.collection.numel, dtype=u.dtype, device=u.device)
    parameters = list(network.parameters.values())
    shapes, at = [p.shape for p in parameters], 0
    with side.within():
        for batch, n in zip(side.run.loader, side.sizes):
            outputs, kept = passed(network, batch)
            cotangents = flat[..., at : at + n].transpose(1, 2).reshape(-1, *outputs.shape).to(outputs.dtype)
            for lo, hi in memory.pieces(len(flat), 2 * network.collection.numel * u.element_size()):
                grads = pull_back(outputs, parameters, shapes, cotangents[lo:hi], retain=kept or hi < len(flat))
                total[lo:hi] += torch.cat([flat_rows(g) for g in grads], 1).to(u.dtype)
            at += n
    return total.view(*u.shape[:-2], -1)


def first_look(side: Side) -> None:
    """Refuse now what products would only meet later: models that mix examples, odd batches, NaN and infinity."""
    team = side.run.team
    with team.together("first look"):
        side.sweep.look()
    if side.run.check:
        ones = torch.ones(side.outputs, side.everywhere, dtype=side.dtype, device=side.device)
        if not bool(torch.isfinite(pull(side, ones).sum())):
            with team.together("first look"):
                side.sweep.raise_where_not_finite()
