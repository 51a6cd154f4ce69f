"""What is pulled back through a batch: columns of a metric, as cotangents of the outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nngeom.capture.network import Batch


@dataclass(frozen=True)
class Columns:
    """``count`` cotangents ``v[k, n, *out]``, made in slices: ``make(lo, hi) -> [hi - lo, n, *out]``."""

    count: int
    make: Callable[[int, int], Tensor]


class Cotangents(Protocol):
    """Axis 2: which cotangents are pulled back."""

    def columns(self, outputs: Tensor, batch: Batch, start: int) -> Columns:
        """Cotangents for the outputs ``(n, *out)`` of a batch whose first example has the running index ``start``."""
