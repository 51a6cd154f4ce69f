"""Whether a model runs for a measure of the library's: then it is no step of a training."""

from __future__ import annotations

import threading
from typing import Any


class _Here(threading.local):
    inside = 0


_HERE = _Here()


class measuring:
    """Within: what this thread calls is called to be measured."""

    def __enter__(self) -> None:
        _HERE.inside += 1

    def __exit__(self, *error: Any) -> None:
        _HERE.inside -= 1


def is_measuring() -> bool:
    """Whether this thread is inside of :func:`measuring`."""
    return _HERE.inside > 0
