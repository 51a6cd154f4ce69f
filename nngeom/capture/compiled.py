"""Functions and modules given to ``torch.compile``, run as they were written."""

from __future__ import annotations

import sys
import threading
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


class as_written:
    """Within: functions and modules given to ``torch.compile`` run as they were written.

    What is compiled has one derivative, hides its uses of parameters and often frees its graph after one backward pass.
    """

    def __enter__(self) -> None:
        self.compiles = "torch._dynamo.eval_frame" in sys.modules  # else nothing was compiled in this process
        if self.compiles:
            _STANCE.enter()

    def __exit__(self, *error: Any) -> None:
        if self.compiles:
            _STANCE.leave()
