"""Small layers of equal shape as one stack: one product for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from nngeom.core.layout import Layout

LARGEST = 64  # side up to which a call takes about as long as its multiplications
Sides = tuple[Any, Any]  # ``L [s, o, p]`` and ``R [s, i, q]`` of ``L^T x R``
T = TypeVar("T")


def arranged(blocks: Mapping[Layout, T]) -> dict[Layout, T]:
    """The same ``blocks``, those of equal shape one after the other."""
    return dict(sorted(blocks.items(), key=lambda item: item[0].sizes))


@dataclass(frozen=True, eq=False)
class Stack:
    """Neighbours with square factors ``left [k s, o, o]`` and ``right [k s, i, i]``, from the block ``first`` on."""

    first: int
    left: Tensor
    right: Tensor

    def of(self, pieces: Sequence[Tensor]) -> Tensor:
        """Its part ``[k s, o, i]`` of the ``pieces`` of one vector."""
        o, i = self.left.shape[-1], self.right.shape[-1]
        return pieces[self.first].as_strided((len(self.left), o, i), (o * i, i, 1))


class Stacks:
    """All stacks of two and more neighbours among blocks, and which blocks stand alone."""

    def __init__(self, blocks: Mapping[Layout, Sides]):
        """``blocks``: their factors."""
        self.stacks: list[Stack] = []
        self._alone: list[bool] = []
        for shape, group in itertools.groupby(blocks.items(), lambda item: _shape(*item)):
            sides = [factors for _, factors in group]
            alone = shape is None or len(sides) == 1
            if not alone:
                left, right = (torch.cat([factors[j] for factors in sides]) for j in (0, 1))
                self.stacks.append(Stack(len(self._alone), left, right))
            self._alone += [alone] * len(sides)

    def others(self, *columns: Iterable[Any]) -> Iterable[Any]:
        """Rows of these ``columns``, with an entry a block, of the blocks that stand alone."""
        return itertools.compress(zip(*columns), self._alone)

    def product(self, x: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """``L^T x R`` of the pieces ``x`` of one vector, into those of another, or of the same, ``out``."""
        for stack in self.stacks:
            torch.bmm(torch.bmm(stack.left.mT, stack.of(x)), stack.right, out=stack.of(out))

    def back(self, x: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """``L x R^T``."""
        for stack in self.stacks:
            torch.bmm(torch.bmm(stack.left, stack.of(x)), stack.right.mT, out=stack.of(out))


def _shape(layout: Layout, sides: Sides) -> tuple[int, ...] | None:
    """What neighbours must share; ``None`` for what is not stacked."""
    s, o, i = layout.sizes
    whole = all(isinstance(f, Tensor) and f.shape == (s, p, p) for f, p in zip(sides, (o, i)))
    return (s, o, i) if whole and max(o, i) <= LARGEST else None
