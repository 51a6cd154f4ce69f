"""Sums over examples, kept apart from their count, so that batches, shards and data sets merge by adding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.linalg import accumulation_dtype


@dataclass
class Rows:
    """A statistic that is stacked instead of summed: rows ``[r, p]`` whose Gram matrix is averaged."""

    parts: list[Tensor]


@dataclass
class Moment:
    """A statistic ``scale * x^T x`` of rows ``x [r, p]``, multiplied where it is added: as ``[*lead, p, p]`` with ones in ``lead``."""

    x: Tensor
    lead: tuple[int, ...] = ()
    scale: float = 1.0

    def added_to(self, total: Tensor | None) -> Tensor:
        """``total`` in place, but for entries below the diagonal, which :func:`linalg.mirror_` completes."""
        p = self.x.shape[1]
        x = self.x.to(accumulation_dtype(self.x.dtype))
        return linalg.add_gram_(None if total is None else total.view(p, p), x, self.scale).view(*self.lead, p, p)


Named = Mapping[Any, Mapping[str, Tensor | Rows | Moment]]  # {block: {name of the statistic: what is added}}


@dataclass
class Sums:
    """``{block: {name: sum over examples}}`` and the number of examples seen."""

    count: int = 0
    _sums: dict[Any, dict[str, Tensor | Rows]] = field(default_factory=dict)
    _halves: set[tuple[Any, str]] = field(default_factory=set)  # moments whose lower half is not there yet

    @property
    def sums(self) -> dict[Any, dict[str, Tensor | Rows]]:
        """The sums so far."""
        for block, name in self._halves:
            linalg.mirror_(self._sums[block][name].flatten(0, -2))  # type: ignore[union-attr]
        self._halves.clear()
        return self._sums

    def add(self, named: Named, examples: int) -> None:
        """Add the sums of some more examples."""
        for block, parts in named.items():
            mine = self._sums.setdefault(block, {})
            for name, t in parts.items():
                held = mine.get(name)
                if isinstance(t, Rows):
                    mine[name] = Rows([*(held.parts if isinstance(held, Rows) else []), *t.parts])
                elif isinstance(t, Moment):
                    mine[name] = t.added_to(held)  # type: ignore[arg-type]
                    self._halves.add((block, name))
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

    def mean(self, used_up: bool = False) -> dict[Any, dict[str, Tensor]]:
        """Sums divided by the number of examples; rows stacked and divided by its square root. ``used_up``: the sums are given up for it."""
        return {block: {name: self._mean(t, used_up) for name, t in tensors.items()} for block, tensors in self.sums.items()}

    def _mean(self, t: Tensor | Rows, used_up: bool) -> Tensor:
        if isinstance(t, Rows):
            return torch.cat(t.parts) / self.count**0.5
        return t.div_(self.count) if used_up and t.is_floating_point() else t / self.count
