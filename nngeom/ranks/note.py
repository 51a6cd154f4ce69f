"""What each process says at the end of its own work, and what all make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nngeom.core.errors import PeerError
from nngeom.ranks.presence import Stopped


@dataclass
class Note:
    """What a process has to say, ``mine``, and after the work is done what ``all`` had, in rank order."""

    mine: Any = None
    all: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Failure:
    """What was raised; ``stopped``: because another process had failed."""

    kind: str
    text: str
    stopped: bool

    @staticmethod
    def of(error: BaseException | None) -> Failure | None:
        """That of an ``error``, if there is one."""
        return None if error is None else Failure(type(error).__name__, str(error), isinstance(error, Stopped))


def require_none(what: str, failures: Sequence[Failure | None]) -> None:
    """Raise :class:`PeerError` for the first that failed by itself in ``what``."""
    for rank, failure in enumerate(failures):
        if failure is not None and not failure.stopped:
            text = f"{what}: rank {rank} of {len(failures)} raised {failure.kind}: {failure.text}"
            raise PeerError(text, rank, failure.kind)
