"""Sums over examples, kept apart from their count, so that batches, shards and data sets merge by adding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nngeom.core.linalg import accumulation_dtype


@dataclass
class Rows:
    """A statistic that is stacked instead of summed: rows ``[r, p]`` whose Gram matrix is averaged."""

    parts: list[Tensor]


Named = Mapping[Any, Mapping[str, Tensor | Rows]]  # {block: {name of the statistic: tensor or rows}}


@dataclass
class Sums:
    """``{block: {name: sum over examples}}`` and the number of examples seen."""

    sums: dict[Any, dict[str, Tensor | Rows]] = field(default_factory=dict)
    count: int = 0

    def add(self, named: Named, examples: int) -> None:
        """Add the sums of some more examples."""
        for block, tensors in named.items():
            mine = self.sums.setdefault(block, {})
            for name, t in tensors.items():
                held = mine.get(name)
                if isinstance(t, Rows):
                    mine[name] = Rows([*(held.parts if isinstance(held, Rows) else []), *t.parts])
                elif isinstance(held, Tensor):
                    held += t
                else:
                    wide = accumulation_dtype(t.dtype)
                    mine[name] = t.to(wide) if t.dtype != wide else t.clone() if t._base is not None else t
        self.count += examples

    def merge(self, others: Iterable[Sums]) -> Sums:
        """The sums over all examples seen by any of them."""
        for other in others:
            self.add(other.sums, other.count)
        return self

    def mean(self) -> dict[Any, dict[str, Tensor]]:
        """Sums divided by the number of examples; rows stacked and divided by its square root."""
        return {block: {name: self._mean(t) for name, t in tensors.items()} for block, tensors in self.sums.items()}

    def _mean(self, t: Tensor | Rows) -> Tensor:
        return torch.cat(t.parts) / self.count**0.5 if isinstance(t, Rows) else t / self.count
