"""Sums over examples added up over processes: the layout is agreed on, then numbers travel in few large messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nngeom.core.errors import RankMismatchError, UnsupportedError
from nngeom.core.kept import Kept, Key, union
from nngeom.core.layout import Layout
from nngeom.core.statistic import Sums, names_of
from nngeom.ranks.fingerprint import digest_of, ranks_text
from nngeom.ranks.team import Team


@dataclass(frozen=True)
class Header:
    """What a process says of its sums: how many examples, and a digest of what there is."""

    count: int
    digest: str

    @staticmethod
    def of(*sums: Sums) -> Header:
        """Of sums over the same examples."""
        return Header(sums[0].count, digest_of([(told(key), k) for s in sums for key, k in s.kept().items()]))


def told(x: Any) -> Any:
    """A block as plain values whose text is the same in every process; raises :class:`UnsupportedError`."""
    if isinstance(x, tuple):
        return tuple(map(told, x))
    if isinstance(x, Layout):
        return [(p.names, p.offset, p.arrangement.view, p.arrangement.order, p.arrangement.sizes) for p in x.pieces]
    if " at 0x" in (text := repr(x)):
        raise UnsupportedError(
            f"a statistic calls a block {text}, by which another process does not know it; expected a Layout, a name, "
            "a number or a tuple of these"
        )
    return text


def alike(headers: Sequence[Header]) -> bool:
    """Whether all processes have the same statistics, in the same order."""
    return len({header.digest for header in headers}) == 1


def merged(sums: Sums, team: Team, headers: Sequence[Header], device: torch.device, *, to: int | None = None) -> Sums:
    """The sums of all processes, whose headers are known; only those of rank ``to`` where one is given.

    What a process has not met counts as zero. Raises :class:`RankMismatchError` for statistics of unlike shapes.
    """
    if team.size == 1:
        return sums
    kept = sums.kept() if alike(headers) else _agreed(team.exchange("statistics", sums.kept()))
    sums.adopt(kept, device)
    team.sum_(sums.addends(), to)
    stacks = sums.stacks()
    if stacks:
        sizes = team.exchange("rows", [len(stack.parts[0]) for stack in stacks])
        for j, stack in enumerate(stacks):
            stack.parts = [team.rows(stack.parts[0], [mine[j] for mine in sizes])]
    sums.count = sum(header.count for header in headers)
    return sums


def _agreed(manifests: Sequence[Mapping[Key, Kept]]) -> dict[Key, Kept]:
    kept, odd = union(manifests)
    for (block, name), each in odd:
        shapes = {k.shape: [r for r, other in enumerate(each) if other and other.shape == k.shape] for k in each if k}
        said = ", ".join(f"{shape} on {ranks_text(ranks)}" for shape, ranks in shapes.items())
        raise RankMismatchError(
            f"the statistic {name!r} of {names_of(block)[:4]} is {said}: the processes use these parameters differently"
        )
    return kept
