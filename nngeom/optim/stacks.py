"""Small layers of equal shape as one stack: one product for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """All stacks of two and more neighbours among blocks, and which blocks stand alone.

    Small ones that do can be multiplied with the stacks, ``singly=True``, or as all others.
    """

    def __init__(self, blocks: Mapping[Layout, Sides]):
        """``blocks``: their factors."""
        self.stacks: list[Stack] = []
        self.singles: list[Stack] = []
        self._alone: list[bool] = []
        self._unlike: list[bool] = []
        self._forth, self._back = _Products(), _Products()
        for shape, group in itertools.groupby(blocks.items(), lambda item: _shape(*item)):
            sides = [factors for _, factors in group]
            alone = shape is None or len(sides) == 1
            if not alone:
                left, right = (torch.cat([factors[j] for factors in sides]) for j in (0, 1))
                self.stacks.append(Stack(len(self._alone), left, right))
            elif shape is not None:
                self.singles.append(Stack(len(self._alone), *sides[0]))
            self._alone += [alone] * len(sides)
            self._unlike += [shape is None] * len(sides)

    def others(self, *columns: Iterable[Any], singly: bool = False) -> Iterable[Any]:
        """Rows of these ``columns``, with an entry a block, of the blocks that are not multiplied here."""
        return itertools.compress(zip(*columns), self._unlike if singly else self._alone)

    def product(self, x: Sequence[Tensor], out: Sequence[Tensor], *, singly: bool = False) -> None:
        """``L^T x R`` of the pieces ``x`` of one vector, into those of another, or of the same, ``out``."""
        if not self._forth.are_of(x, out):
            self._forth = _Products.of(self, x, out, lambda stack: (stack.left.mT, stack.right))
        self._forth.multiply(singly=singly)

    def back(self, x: Sequence[Tensor], out: Sequence[Tensor], *, singly: bool = False) -> None:
        """``L x R^T``."""
        if not self._back.are_of(x, out):
            self._back = _Products.of(self, x, out, lambda stack: (stack.left, stack.right.mT))
        self._back.multiply(singly=singly)


Product = tuple[Tensor, Tensor, Tensor, Tensor]  # ``L``, ``x``, ``R``, and where ``L x R`` goes


@dataclass(frozen=True, eq=False)
class _Products:
    """What is multiplied in every step, found once for the same lists of pieces, ``x`` and ``out``."""

    x: Sequence[Tensor] = ()
    out: Sequence[Tensor] = ()
    together: Sequence[Product] = ()
    alone: Sequence[Product] = ()

    @staticmethod
    def of(stacks: Stacks, x: Sequence[Tensor], out: Sequence[Tensor], sides: Callable[[Stack], Sides]) -> _Products:
        """All of ``stacks``, with these ``sides`` of each."""
        made = lambda stack: (sides(stack)[0], stack.of(x), sides(stack)[1], stack.of(out))
        return _Products(x, out, [made(stack) for stack in stacks.stacks], [made(stack) for stack in stacks.singles])

    def are_of(self, x: Sequence[Tensor], out: Sequence[Tensor]) -> bool:
        """Whether they are of these very lists."""
        return self.x is x and self.out is out

    def multiply(self, *, singly: bool) -> None:
        """All of them, or those of stacks."""
        products = [*self.together, *self.alone] if singly else self.together
        if not products:
            return
        autocast = torch.is_autocast_enabled(products[0][3].device.type)  # whose products are in a dtype of its own
        for left, x, right, out in products:
            if autocast:
                out.copy_(torch.bmm(torch.bmm(left, x), right))
            else:
                torch.bmm(torch.bmm(left, x), right, out=out)


def _shape(layout: Layout, sides: Sides) -> tuple[int, ...] | None:
    """What neighbours must share; ``None`` for what is not stacked."""
    s, o, i = layout.sizes
    whole = all(isinstance(f, Tensor) and f.shape == (s, p, p) for f, p in zip(sides, (o, i)))
    return (s, o, i) if whole and max(o, i) <= LARGEST else None
