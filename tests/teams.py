"""Processes played by threads: a team whose messages go through a list."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from nngeom.ranks.note import Failure, Note, require_none
from nngeom.ranks.team import Alone


class Threads(Alone):
    """One of ``size`` ranks that run in threads; what is sent are small objects."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.ranks = rank, size, list(range(size))
        self._board, self._barrier = board, barrier

    @contextlib.contextmanager
    def together(self, what):
        note, error = Note(), None
        try:
            yield note
        except Exception as e:
            error = e
        said = self.exchange(what, (Failure.of(error), note.mine))
        if error is not None:
            raise error
        require_none(what, [failure for failure, _ in said])
        note.all = [x for _, x in said]

    def exchange(self, what, x):
        self._board[self.rank] = x
        self._barrier.wait(20)
        said = list(self._board)
        self._barrier.wait(20)
        return said


def ranks(size: int, run: Callable[[Threads], Any]) -> list[Any]:
    """What ``run(team)`` returned or raised in each of them."""
    board, barrier, out = [None] * size, threading.Barrier(size), [None] * size

    def one(rank: int) -> None:
        try:
            out[rank] = run(Threads(rank, size, board, barrier))
        except Exception as error:
            out[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return out
