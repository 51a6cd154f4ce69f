"""Sums over the examples of all processes, of what each computes from its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import LoaderError, RankMismatchError
from nngeom.ranks.fingerprint import bits, ranks_text
from nngeom.ranks.team import Team

Local = tuple[Sequence[Tensor], int]


def totals(team: Team, what: str, local: Callable[[], Local], given: Sequence[Tensor] = ()) -> tuple[list[Tensor], int]:
    """The sums of what ``local() -> (tensors, examples)`` returns in each process: fresh tensors of the same shapes.

    ``given``: what the call was given, as the vectors of a product; raises :class:`RankMismatchError` where it differs.
    """
    with team.together(what) as note:
        tensors, count = local()
        note.mine = count, bits(given) if team.size > 1 else None
    require_same_vectors(what, [said for _, said in note.all])
    own = [t.contiguous() for t in tensors]
    team.sum_(own)
    return own, sum(count for count, _ in note.all)


def mean(team: Team, what: str, local: Callable[[], tuple[Tensor, int]], given: Sequence[Tensor] = ()) -> Tensor:
    """The mean over all examples, in the place of the sum; arguments and errors as for :func:`totals`."""

    def one() -> Local:
        total, count = local()
        return [total], count

    (total,), count = totals(team, what, one, given)
    return total.div_(count)


def require_same_vectors(what: str, said: Sequence[Any]) -> None:
    """Raise :class:`RankMismatchError` unless all ``said`` the same of the vectors given to ``what``."""
    odd = [rank for rank, other in enumerate(said) if other != said[0]]
    if odd:
        raise RankMismatchError(
            f"{what}: {ranks_text(odd)} of {len(said)} gave other vectors than rank 0; expected the same on all, as "
            "from a generator with the same seed"
        )


def generator_of(team: Team, generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """The draws of rank 0's ``generator`` (by default torch's own on the ``device``) on all processes; only rank 0's
    goes on by them.
    """
    if team.size == 1:
        return generator
    state = None
    if team.rank == 0:
        state = _of_torch(device).get_state() if generator is None else generator.get_state()
    state = team.first("draws", state)
    if team.rank == 0:
        return generator
    return torch.Generator(device if generator is None else generator.device).set_state(state)


def _of_torch(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def gathered(team: Team, what: str, local: Callable[[], Tensor | None], device: torch.device) -> Tensor:
    """What ``local()`` returns in each process, a row an example, ``None`` without any: all in rank order.

    Raises :class:`LoaderError` where no process has any, :class:`RankMismatchError` where rows are of unlike shapes or
    dtypes.
    """
    with team.together(what) as note:
        mine = local()
        note.mine = None if mine is None else (len(mine), tuple(mine.shape[1:]), mine.dtype)
    known = [said for said in note.all if said is not None]
    if not known:
        raise LoaderError("no example was seen; expected a loader with at least one")
    if len({said[1:] for said in known}) > 1:
        ranks = ", ".join(f"{said[1]} {said[2]} on rank {r}" for r, said in enumerate(note.all) if said is not None)
        raise RankMismatchError(f"{what}: an example has {ranks}; expected the same on all processes")
    _, shape, dtype = known[0]
    own = torch.empty(0, *shape, dtype=dtype, device=device) if mine is None else mine.contiguous()
    sent = own if dtype.is_floating_point else own.long()  # not all whole numbers can be sent
    return team.rows(sent, [0 if said is None else said[0] for said in note.all]).to(dtype)
