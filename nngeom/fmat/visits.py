"""Batches that go from process to process, and which of two that meet computes what."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import UnsupportedError
from nngeom.fmat.side import Side
from nngeom.ranks.messages import put_together, taken_apart
from nngeom.ranks.team import Team

Piece = tuple[slice, slice]  # rows of one process, columns of another


def visiting(team: Team, side: Side, steps: int) -> Iterator[list[Any]]:
    """The batches of the process ``1, 2, ... steps`` ranks before this one, that come round."""
    if not steps:
        return
    with team.together("batches") as note:
        rest, held = _packed(side)
        note.mine = rest, [(tuple(t.shape), t.dtype) for t in held]
    for step in range(1, steps + 1):
        text, shapes = note.all[(team.rank - step) % team.size]
        arrived = [torch.empty(shape, dtype=dtype, device=side.device) for shape, dtype in shapes]
        team.pass_on(held, arrived)
        held = arrived
        yield put_together(text, held)


def _packed(side: Side) -> tuple[bytes, list[Tensor]]:
    """The batches of a side as they are sent."""
    try:
        rest, held = taken_apart(list(side.run.loader))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UnsupportedError(
            f"the batches cannot be sent to the other processes ({error}); expected tensors, numbers and texts in "
            "tuples, lists and dicts, or objects that pickle"
        ) from error
    odd = next((t for t in held if t.layout is not torch.strided or t.is_nested), None)
    if odd is not None:
        raise UnsupportedError(
            f"a batch holds a tensor of layout {odd.layout}, which is not sent; expected a strided one"
        )
    return rest, [t.contiguous() for t in held]


def on(side: Side, batches: list[Any]) -> Side:
    """The same ``side`` of other ``batches``."""
    return replace(side, sweep=replace(side.sweep, run=side.run.on(batches)), group=None)


def parts(rows: Side, batches: list[Any], piece: Piece, n: Sequence[int]) -> tuple[Side, Side]:
    """Own ``rows`` and visiting ``batches`` of a ``piece``; ``n``: how many examples each process has."""
    own = list(rows.run.loader)
    left = rows if piece[0].stop == n[rows.run.team.rank] else on(rows, own[: len(own) // 2])
    return left, on(rows, batches if piece[1].start == 0 else batches[len(batches) // 2 :])


def first_half(rows: Side) -> int:
    """The examples in the first half of the batches of ``rows``."""
    return sum(rows.sizes[: len(rows.sizes) // 2])


def shifted(s: slice, to: slice) -> slice:
    """``s`` counted from where ``to`` starts."""
    return slice(to.start + s.start, to.start + s.stop)


def piece_of(n: Sequence[int], halves: Sequence[int], rank: int, source: int) -> Piece:
    """Which rows of ``rank`` and columns of ``source`` the former computes, of ``n`` examples each and in the first
    ``halves`` of their batches: where two processes visit each other at the same time each takes a half, so that a
    kernel is symmetric to the bit.
    """
    if 2 * ((rank - source) % len(n)) != len(n):
        return slice(0, n[rank]), slice(0, n[source])
    if rank < source:
        return slice(0, halves[rank]), slice(0, n[source])
    return slice(0, n[rank]), slice(halves[source], n[source])


def has_examples(left: Side, right: Side, piece: Piece) -> bool:
    """Whether there are any on both sides."""
    return bool(left.sizes and right.sizes and all(s.stop > s.start for s in piece))
