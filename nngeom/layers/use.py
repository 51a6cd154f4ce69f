"""What an adapter says of a call: which parts of parameters were used as which matrix, and how the rest is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nngeom.core.layout import Arrangement


@dataclass(frozen=True)
class Slot:
    """A parameter read as a matrix ``[s, o, i]``, of which one use sees the part starting at ``(row, column)``."""

    name: str
    arrangement: Arrangement
    row: int = 0
    column: int = 0


@dataclass(frozen=True, eq=False)
class Use:
    """One call of one operation with parameters."""

    operation: str  # its name in reports; nothing is decided by it
    weight: Slot | None
    bias: Slot | None
    lead: tuple[int, ...]  # sizes of the axes of the output that hold examples and positions
    gradients: Callable[[Tensor], Tensor]  # [k, *out] -> [k, *lead, s, o]
    inputs: Callable[[], Tensor] | None = None  # () -> [*lead, s, i]; integer [*lead] for lookups; None without weight
    copied: Callable[[Callable, bool], Tensor] | None = (
        None  # (empty, ones) -> copies of inputs, in ``empty(sizes, like)``, and the ones of the bias
    )
    channels: int = -1  # axis of the output that holds features
    lookup: bool = False
    elementwise: bool = False  # o = 1 by nature: rows are formed at once, blocks are exact
    product: bool = False  # the input times the matrix, both read as they are: also its second derivatives are products
    serial: bool = False  # several cotangents go back through it no faster together than one after the other

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The parameters used."""
        return tuple(s for s in (self.weight, self.bias) if s is not None)

    @property
    def size(self) -> int:
        """Number of rows of the table of a lookup."""
        return self.weight.arrangement.sizes[2] if self.weight is not None else 0
