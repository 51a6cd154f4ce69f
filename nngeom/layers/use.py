"""What an adapter says of a call: which parts of parameters were used as which matrix, and how the rest is read."""

from __future__ import annotations

import functools
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

    @staticmethod
    @functools.lru_cache(2**12)
    def of(name: str, arrangement: Arrangement, row: int = 0, column: int = 0) -> Slot:
        """The same object for the same arguments, ``name``, ``arrangement``, ``row`` and ``column`` as in the class."""
        return Slot(name, arrangement, row, column)


@dataclass(frozen=True, eq=False)
class Use:
    """What an adapter says of one call of an operation that is affine in its parameters.

    Args:
        operation: its name in reports; nothing is decided by it.
        weight: the parameter that multiplies the inputs, ``None`` without one.
        bias: the parameter that is added, ``None`` without one.
        lead: sizes of the axes of the output that hold examples and positions.
        gradients: ``[k, *out] -> [k, *lead, s, o]``, the gradients of the output as the rows need them.
        inputs: ``() -> [*lead, s, i]``, integer ``[*lead]`` for lookups; ``None`` without weight.
        copied: where reading inputs copies them anyhow: ``(empty, ones=...)`` to the copy in memory that ``empty(sizes,
            like)`` gives, with ``ones`` followed by a column of ones for the bias.
        channels: the axis of the output that holds features.
        lookup: inputs are indices, one-hot rows.
        elementwise: ``o = 1`` by nature: rows are formed at once, blocks are exact.
        product: the output is the input times the matrix, both read as they are: derivatives of any order are products.
        counts: ``() -> [s]``, how many rows are in every group, where each is in one and zero in the others.
        serial: several cotangents go back through it no faster together than one after the other.
    """

    operation: str
    weight: Slot | None
    bias: Slot | None
    lead: tuple[int, ...]
    gradients: Callable[[Tensor], Tensor]
    inputs: Callable[[], Tensor] | None = None
    copied: Callable[..., Tensor] | None = None
    channels: int = -1
    lookup: bool = False
    elementwise: bool = False
    product: bool = False
    counts: Callable[[], Tensor] | None = None
    serial: bool = False

    @functools.cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The parameters used."""
        return tuple(s for s in (self.weight, self.bias) if s is not None)

    @property
    def size(self) -> int:
        """Number of rows of the table of a lookup."""
        return self.weight.arrangement.sizes[2] if self.weight is not None else 0
