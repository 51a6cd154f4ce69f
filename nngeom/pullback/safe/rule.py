"""What a rule is: where the examples lie in an input of an operation, told from where they lie in its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from nngeom.pullback.axes import ExampleAxis


class Unknown:
    """What the graph does not tell: :data:`ASK`."""

    def __repr__(self) -> str:
        return "ASK"


ASK = Unknown()
Sizes = tuple[int, ...]
Place = ExampleAxis | None | Unknown
Rule = Callable[[Any, int, ExampleAxis, Sizes, Sizes, int], Place]
"""``(node, which input, axis in the output, sizes of the output, sizes of the input, n) -> place in the input``."""
RULES: dict[str, Rule] = {}


def safe(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations, by the names of their derivatives."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return register


def kept(dim: int, axis: ExampleAxis, out: Sizes, sizes: Sizes) -> Place:
    """Axis ``dim`` of the input is the axis of the output, entry by entry."""
    if not 0 <= dim < len(sizes) or sizes[dim] != out[axis.at]:
        return ASK
    return ExampleAxis(dim, axis.outer)


def from_front(given: Iterable[int], rank: int) -> list[int]:
    """Axes counted from the front; torch keeps negative ones as unsigned numbers."""
    return [(d - 2**64 if d >= 2**63 else d) % max(rank, 1) for d in given]
