"""What processes learn of each other outside of collectives: who has failed, and who has not come."""

from __future__ import annotations

import contextlib
import time
from typing import Any

POLL = 0.5  # seconds between two looks at whether another process has failed


class Stopped(Exception):
    """Another process has failed in the work that is done together."""


class Presence:
    """Notes in the ``store`` of a process group, where there is one."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self._step, self._looked = 0, 0.0

    def fail(self, call: int) -> None:
        """Say that this process failed in its ``call``-th piece of work."""
        self._say(f"failed/{call}", "1")

    def poll(self, call: int) -> None:
        """Raise :class:`Stopped` where another one did; looks at most twice a second."""
        now = time.monotonic()
        if self.store is not None and now - self._looked >= POLL:
            self._looked = now
            if self.store.check([f"failed/{call}"]):
                raise Stopped

    def arrive(self) -> None:
        """Say that this process has come to the next collective."""
        self._step += 1
        self._say(f"at/{self.rank}", str(self._step))

    def missing(self) -> str:
        """Who has not come to where this process is, as a sentence."""
        late = [r for r in range(self.size) if r != self.rank and self._step_of(r) < self._step]
        ranks = f"rank {', '.join(map(str, late))} of {self.size}" if late else "another process"
        return f"{ranks} did not come to the call that this one is in, or ended there, or the network is gone"

    def _say(self, key: str, value: str) -> None:
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # of a store whose process is gone
                self.store.set(key, value)

    def _step_of(self, rank: int) -> int:
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                key = f"at/{rank}"
                return int(self.store.get(key)) if self.store.check([key]) else 0
        return self._step
