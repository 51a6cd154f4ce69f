"""What an adapter says of a call: which parts of parameters were used as which matrix, and how the rest is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nngeom.core.layout import Arrangement


@dataclass(frozen=True)
class Slot:
    """A parameter, by ``name``, read by ``arrangement`` as a matrix ``[s, o, i]``, of which one use sees the part
    starting at ``(row, column)``.
    """

    name: str
    arrangement: Arrangement
    row: int = 0
    column: int = 0


@dataclass(frozen=True, eq=False)
class Use:
    """What an adapter says of one call of an operation that is affine in its parameters.

    ``operation``: its name in reports; nothing is decided by it. ``weight``, ``bias``: the parameters, as
    :meth:`~nngeom.layers.adapter.Call.whole` and its like find them. ``lead``: sizes of the axes of the output that
    hold examples and positions.

    ``gradients``: ``[k, *out] -> [k, *lead, s, o]``. ``inputs``: ``() -> [*lead, s, i]``, integers ``[*lead]`` for a
    lookup, ``None`` without weight. ``copied``, where reading inputs copies them anyhow: ``(empty, ones)`` to the same
    in the memory of ``empty(sizes, like)``, with ``ones`` followed by a column of ones for the bias.

    ``channels``: the axis of the output that holds features. ``lookup``: inputs are rows of a table, by their number.
    ``elementwise``: one output a group by nature, so that rows are formed at once and blocks are exact. ``product``:
    the output is the input times the matrix, both read as they are, so that derivatives of any order are products too.
    ``serial``: several cotangents go back through it no faster together than one after the other.
    """

    operation: str
    weight: Slot | None
    bias: Slot | None
    lead: tuple[int, ...]
    gradients: Callable[[Tensor], Tensor]
    inputs: Callable[[], Tensor] | None = None
    copied: Callable[[Callable[..., Tensor], bool], Tensor] | None = None
    channels: int = -1
    lookup: bool = False
    elementwise: bool = False
    product: bool = False
    serial: bool = False

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The parameters used."""
        return tuple(s for s in (self.weight, self.bias) if s is not None)

    @property
    def size(self) -> int:
        """Number of rows of the table of a lookup."""
        return self.weight.arrangement.sizes[2] if self.weight is not None else 0
