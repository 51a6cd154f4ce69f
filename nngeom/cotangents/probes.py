"""Random probes of the outputs: instead of every column of the square root ``L`` of their metric, random signs of all
of them.

Signs ``r`` that are independent of each other make ``u = L r`` with ``E[u u^T] = L L^T``, whatever the number of
outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nngeom.core.errors import OutputError
from nngeom.core.stream import RUNNING, Numbers, Stream
from nngeom.sweep.columns import Columns


class Rooted(Protocol):
    """A metric of the outputs that multiplies its square root."""

    def root_times(self, outputs: Tensor, noise: Callable[..., Tensor], batch: Any) -> Tensor:
        """``L r (k, n, *shape)``, for ``noise(*size) -> r (k, n, *size)``."""


@dataclass(frozen=True)
class Probes:
    """``scale * L r`` for ``count`` draws of the signs ``r``, keyed by (seed, number of the example, sample)."""

    cotangents: Rooted
    count: int
    seed: int
    scale: float = 1.0
    first: int = 0  # sample of the first draw
    numbers: Numbers = RUNNING

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """One probe a cotangent."""
        numbers = self.numbers.of(batch, start, outputs.shape[0])

        def make(lo: int, hi: int) -> Tensor:
            v = self.cotangents.root_times(outputs, lambda *size: self._signs(outputs, numbers, (lo, hi), size), batch)
            if v.shape != (hi - lo, *outputs.shape):
                raise OutputError(
                    f"root_times returned {tuple(v.shape)}; expected {(hi - lo, *outputs.shape)}, a probe of the "
                    "outputs for each draw"
                )
            return self.scale * v

        return Columns(self.count, make)

    def _signs(self, outputs: Tensor, numbers: Tensor, draws: tuple[int, int], size: tuple[int, ...]) -> Tensor:
        """``(hi - lo, n, *size)`` for the draws ``(lo, hi)``."""
        samples = (self.first + j for j in range(*draws))
        return torch.stack([Stream(self.seed, numbers, j, outputs.device).signs(*size) for j in samples]).to(outputs)
