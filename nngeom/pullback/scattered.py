"""Uses whose examples the data scatters: tokens sorted to experts, nodes of many graphs in one table, sequences without
their padding. No axis holds the examples there, but every row is of one, and numbers tell of which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Seen = tuple[Tensor, Tensor, Tensor, Tensor]  # rows as numbers, these weighted, what was added up for that, weights
_PRIME = 8191  # above the number of signs and powers of two


@dataclass(frozen=True, eq=False)
class Scattered:
    """Row ``order[j, t]`` of a use is the ``t``-th of example ``j``; where that is -1 it has less."""

    order: Tensor  # [n, t]
    rows: int
    asked: ClassVar[bool] = True

    @property
    def each(self) -> float:
        """Rows an example, on average."""
        return self.rows / len(self.order)

    def split(self, x: Tensor, n: int, before: int, lead: int) -> Tensor:
        """``[*before, *lead, *rest] -> [*before, n, t, *rest]``, zero where an example has less rows."""
        if not self.rows:
            return x.new_zeros(*x.shape[:before], *self.order.shape, *x.shape[before + lead :])
        rows = x.flatten(before, before + lead - 1) if lead > 1 else x if lead else x.unsqueeze(before)
        taken = rows.index_select(before, self.order.flatten().clamp(min=0)).unflatten(before, self.order.shape)
        missing = (self.order < 0).view(*self.order.shape, *[1] * (x.ndim - before - lead))
        return taken.masked_fill_(missing, 0)


def scattered(seen: Sequence[Seen], rounding: float) -> Scattered | None:
    """The examples of the rows of a use, from what weights made of them; ``None`` where a row is of none alone.

    A row of zeros is of any example: it is in nobody's gradient, in this batch.
    """
    n, rows = len(seen[0][3]), seen[0][0].numel()
    if not rows:
        return Scattered(seen[0][3].new_full((n, 1), -1, dtype=torch.long), 0)
    ranked, which = _numbered([weight for *_, weight in seen]).sort()
    found = _numbered([(y / x).flatten() for x, y, *_ in seen])
    owner = which[torch.searchsorted(ranked, found).clamp(max=n - 1)]
    place = torch.arange(rows, device=owner.device)
    silent = torch.stack([((x == 0) & (size == 0)).flatten() for x, _, size, _ in seen]).all(0)
    owner = torch.where(silent, place % n, owner)
    for x, y, size, weight in seen:
        off = (y.flatten() - x.flatten() * weight[owner]).abs()
        if not bool((off <= rounding * size.flatten()).all()):
            return None
    counts = owner.bincount(minlength=n)
    order = counts.new_full((n, int(counts.max())), -1)
    sorted_rows = owner.argsort(stable=True)
    owners = owner[sorted_rows]
    order[owners, place - (counts.cumsum(0) - counts)[owners]] = sorted_rows
    return Scattered(order, rows)


def _numbered(weights: Sequence[Tensor]) -> Tensor:
    """A number for every sequence of signs and powers of two; of others that of the nearest."""
    number = torch.zeros(weights[0].shape, dtype=torch.long, device=weights[0].device)
    for x in weights:
        power = x.double().abs().log2().nan_to_num(0.0).clamp(-1000, 1000).round().long()
        number = _PRIME * number + 2 * (power + 1000) + (x < 0)
    return number
