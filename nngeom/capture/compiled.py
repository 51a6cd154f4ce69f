"""Functions and modules given to ``torch.compile``, run as they were written."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch


class _Stance:
    """How many are inside :func:`as_written`, in all threads: the stance of the compiler is one for the process."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.held: Any = None

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                self.held = torch.compiler.set_stance("force_eager")
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.held.__exit__(None, None, None)


_STANCE = _Stance()


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Within: functions and modules given to ``torch.compile`` run as they were written.

    What is compiled has one derivative, hides its uses of parameters and often frees its graph after one backward pass.
    """
    if "torch._dynamo.eval_frame" not in sys.modules:  # nothing was compiled in this process
        yield
        return
    _STANCE.enter()
    try:
        yield
    finally:
        _STANCE.leave()
