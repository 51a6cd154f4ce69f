"""Objects with tensors that every process has of its own, on all of them or on one, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nngeom.ranks.messages import put_together, taken_apart
from nngeom.ranks.team import Team


def collected(team: Team, what: str, x: Any, device: torch.device, rank: int | None = None) -> Iterator[Any]:
    """The objects ``x`` of all processes in rank order, their tensors on ``device``: on every process, or on ``rank``
    alone, and nothing elsewhere. All processes exhaust it.
    """
    with team.together(what) as note:
        rest, mine = taken_apart(x)
        mine = [t.contiguous() for t in mine]
        note.mine = rest, [(tuple(t.shape), t.dtype) for t in mine]
    here = rank in (None, team.rank)
    for source, (other, shapes) in enumerate(note.all):
        tensors = mine if source == team.rank else []
        if here and source != team.rank:
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        if rank is None:
            team.spread(tensors, source)
        elif source != rank:
            sent, into = (tensors, []) if source == team.rank else ([], tensors)
            team.pass_on(sent, into, (rank - source) % team.size)
        if here:
            yield put_together(other, tensors)
