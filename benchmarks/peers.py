"""Other libraries doing the same jobs, through their public interfaces, where they are installed (extras ``bench``)."""

from __future__ import annotations

from benchmarks.ours import Contender

PEERS: dict[str, dict[str, Contender]] = {}


def peers(job: str) -> dict[str, Contender]:
    """The contenders of other libraries that are installed."""
    return PEERS.get(job, {})
