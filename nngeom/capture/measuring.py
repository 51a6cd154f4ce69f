"""Whether a model runs for a measure of the library's: then it is no step of a training."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _Here(threading.local):
    inside = 0


_HERE = _Here()


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Within: what this thread calls is called to be measured."""
    _HERE.inside += 1
    try:
        yield
    finally:
        _HERE.inside -= 1


def is_measuring() -> bool:
    """Whether this thread is inside of :func:`measuring`."""
    return _HERE.inside > 0
