"""Tensors that were sent stay objects of Python for a while, without their memory.

torch 2.6's gloo can hang in ``destroy_process_group`` where one of its threads is the last to let go of a tensor that
Python knows: the thread waits for the interpreter, which waits for the thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

_LAST: deque[Tensor] = deque(maxlen=64)


@torch.no_grad()  # views of parameters too
def let_go(sent: Iterable[Tensor]) -> None:
    """Empty what was ``sent`` and has arrived: tensors or views that nobody else holds."""
    for t in sent:
        if t.device.type == "cpu":
            t.set_()  # type: ignore[call-overload]
            _LAST.append(t)
