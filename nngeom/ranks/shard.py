"""The examples of a data set that a process takes."""

from __future__ import annotations

from typing import Any, TypeVar

from torch.utils.data import Dataset, Subset

from nngeom.core.errors import ArgumentTypeError
from nngeom.ranks.team import Team, world

T_co = TypeVar("T_co", covariant=True)


def shard(dataset: Dataset[T_co], process_group: Any = None) -> Subset[T_co]:
    """This process's examples of a ``dataset``: neighbours, without padding and without repeats, in rank order.

    Every example is in the shard of one process, shards differ by one example at most, and a process may have none.
    Their concatenation in rank order is the data set, so that a measure over the shards, with the same
    ``process_group``, is that of one process over the whole.

    ``dataset`` has a length and is indexed by numbers. ``process_group``: by default all processes where
    ``torch.distributed`` runs, else this one alone, which takes everything. Raises :class:`ArgumentTypeError` for a
    data set without length, and for what is no group.
    """
    team = world() if process_group is None else Team.of(process_group)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ArgumentTypeError(
            f"dataset is {type(dataset).__name__}, without length or numbered examples; expected a map-style data set: "
            "of an iterable one every process must read its own part by itself"
        )
    n = len(dataset)
    lo, hi = (n * r // team.size for r in (team.rank, team.rank + 1))
    return Subset(dataset, range(lo, hi))
