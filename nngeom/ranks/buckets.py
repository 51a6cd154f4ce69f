"""Many tensors sent as few: copied side by side into buckets of one dtype and device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nngeom.ranks.let_go import let_go

BYTES = {"cpu": 25 * 2**20}  # of a bucket
ELSEWHERE = 256 * 2**20


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when it is done."""


def limit_of(t: Tensor) -> int:
    """Numbers in a bucket for a tensor like ``t``."""
    return max(1, BYTES.get(t.device.type, ELSEWHERE) // t.element_size())


def pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Views no larger than a bucket, but those that are sent where they are: large and contiguous."""
    for t in tensors:
        limit = limit_of(t)
        if t.numel() <= limit or t.is_contiguous():
            yield t
        else:
            yield from pieces(t.split(max(1, limit * t.shape[0] // t.numel())) if t.shape[0] > 1 else [t[0]])


def grouped(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Pieces that go together, in order; the same for the same shapes and dtypes."""
    open_: dict[tuple[torch.dtype, str], list[Tensor]] = {}
    full: list[list[Tensor]] = []
    for t in pieces(tensors):
        if t.numel() == 0:
            continue
        if t.numel() >= limit_of(t) and t.is_contiguous():
            full.append([t])
            continue
        key = t.dtype, t.device.type
        mine = open_.setdefault(key, [])
        if mine and sum(x.numel() for x in mine) + t.numel() > limit_of(t):
            full.append(mine)
            mine = open_[key] = []
        mine.append(t)
    return full + [group for group in open_.values() if group]


def through(tensors: Iterable[Tensor], send: Callable[[Tensor], Work], *, flying: int = 2) -> None:
    """Send all in place, ``send(flat)`` what goes together; ``flying``: how many are under way at once.

    All memory is taken before the first is sent, so that none is missing between two.
    """
    groups = grouped(tensors)
    room = [_rooms(groups) for _ in range(min(flying, len(groups)))]
    under_way: list[tuple[Work, Tensor, list[Tensor]]] = []
    for j, group in enumerate(groups):
        if len(under_way) == flying:
            _land(*under_way.pop(0))
        flat = _joined(group, room[j % flying])
        under_way.append((send(flat), flat, group))
    for sent in under_way:
        _land(*sent)


@contextlib.contextmanager
def copied(tensors: Sequence[Tensor], *, away: bool) -> Iterator[Sequence[Tensor]]:
    """The tensors, or for those on a GPU that are to be sent ``away`` from it, copies that are copied back."""
    held = [t.cpu() if t.is_cuda and away else t for t in tensors]
    yield held
    for t, h in zip(tensors, held):
        if h is not t:
            t.copy_(h)


def _rooms(groups: list[list[Tensor]]) -> dict[tuple[torch.dtype, torch.device], Tensor]:
    """Memory for the largest group of each dtype and device that is copied."""
    out: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    for group in groups:
        size, like = sum(t.numel() for t in group), group[0]
        key = like.dtype, like.device
        if not _stays(group) and (key not in out or out[key].numel() < size):
            out[key] = like.new_empty(size)
    return out


def _stays(group: list[Tensor]) -> bool:
    return len(group) == 1 and group[0].is_contiguous()


def _joined(group: list[Tensor], room: dict[tuple[torch.dtype, torch.device], Tensor]) -> Tensor:
    if _stays(group):
        return group[0].view(-1)
    flat = room[group[0].dtype, group[0].device][: sum(t.numel() for t in group)]
    for t, part in _parts(group, flat):
        part.copy_(t)
    return flat


def _land(work: Work, flat: Tensor, group: list[Tensor]) -> None:
    work.wait()
    if not _stays(group):
        for t, part in _parts(group, flat):
            t.copy_(part)
    let_go([flat])


def _parts(group: list[Tensor], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for t, part in zip(group, flat.split([t.numel() for t in group])):
        yield t, part.view(t.shape)
