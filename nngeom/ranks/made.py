"""Work that one process does for all: each piece is made by one of them, and sent."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

from nngeom.core.beside import beside
from nngeom.ranks.messages import put_together, taken_apart
from nngeom.ranks.team import Team

K = TypeVar("K", bound=Hashable)


def assigned(costs: Mapping[K, float], size: int) -> dict[K, int]:
    """Who makes which piece: the most expensive first, each to the one with least to do; the same in every process for
    the same ``costs`` in the same order.
    """
    loads, owners = [0.0] * size, dict[K, int]()
    for key in sorted(costs, key=lambda key: -costs[key]):
        owners[key] = loads.index(min(loads))
        loads[owners[key]] += costs[key]
    return {key: owners[key] for key in costs}


def made(
    team: Team,
    what: str,
    costs: Mapping[K, float],
    make: Callable[[K], Any],
    device: torch.device,
    *,
    threaded: bool = False,
) -> dict[K, Any]:
    """``make(key)`` for every key of ``costs``, each made by one process and sent to the others, so that all have the
    same bits; tensors lie on ``device``. ``threaded``: several at once, as by :func:`~nngeom.core.beside.beside`. What
    one raises, all raise.
    """
    each = functools.partial(beside, make, device=device) if threaded else functools.partial(_in_turn, make)
    if team.size == 1:
        return each(costs)
    owners = assigned(costs, team.size)
    with team.together(what) as note:
        rest, mine = taken_apart(each({key: cost for key, cost in costs.items() if owners[key] == team.rank}))
        mine = [t.contiguous() for t in mine]
        note.mine = rest, [(tuple(t.shape), t.dtype) for t in mine]
    found: dict[K, Any] = {}
    for rank, (other, shapes) in enumerate(note.all):
        empty = (
            [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes] if rank != team.rank else mine
        )
        team.spread(empty, rank)
        found |= put_together(other, empty)
    return {key: found[key] for key in costs}


def _in_turn(make: Callable[[K], Any], costs: Mapping[K, float]) -> dict[K, Any]:
    return {key: make(key) for key in costs}
