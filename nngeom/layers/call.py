"""What an adapter may ask about the call it is looking at: which arguments are parameters, and read as which matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from nngeom.core.layout import Arrangement
from nngeom.core.whole import whole
from nngeom.layers.use import Slot


class NotStructured(Exception):
    """Raised inside adapters only: this use has no Kronecker structure, the fallback takes it."""


class Call:
    """What an adapter may ask about the call it is looking at.

    ``find``: ``(name, parameter)`` of a tensor that is a selected parameter or a view of one, else ``None``; ``out``:
    the output of the call; ``given``: how many of its arguments, however deep, are such parameters or views;
    ``keep_graph``: inputs are to keep theirs.
    """

    def __init__(
        self, find: Callable[[Tensor], tuple[str, Tensor] | None], out: Tensor, given: int, *, keep_graph: bool
    ) -> None:
        self._find, self.out, self.given, self.keep_graph = find, out, given, keep_graph
        self.sources: list[tuple[Tensor, int]] = []
        self.entry: GradientEdge | None = None  # of the input that was kept last

    def is_parameter(self, x: Any) -> bool:
        """Whether ``x`` is a selected parameter or a view of one."""
        return isinstance(x, Tensor) and self._find(x) is not None

    def _parameter(self, x: Tensor | None) -> tuple[str, Tensor] | None:
        """``(name, parameter)`` of a parameter or view; empty ones and unusual outputs have no structure."""
        parameter = None if x is None else self._find(x)
        if parameter is not None and (not parameter[1].numel() or self.out.is_complex() or self.out.is_nested):
            raise NotStructured
        return parameter

    def keep(self, x: Tensor) -> Tensor:
        """An input ``x`` to be read later: detached unless the kernel is to be differentiated."""
        if x.is_complex() or x.is_nested or x.layout is not torch.strided:
            raise NotStructured  # rows of complex products are sums of two; the others have no strides
        self.entry = None if x.grad_fn is None else GradientEdge(x.grad_fn, x.output_nr)
        x = whole(x if self.keep_graph else x.detach())
        self.sources.append((x, x._version))
        return x

    def whole(self, x: Tensor | None, arrangement: Arrangement) -> Slot | None:
        """The slot of a parameter used whole, read by ``arrangement``; ``None`` where ``x`` is no selected parameter. A
        partial view raises.
        """
        parameter = self._parameter(x)
        if x is None or parameter is None:
            return None
        name, base = parameter
        if x.numel() != base.numel() or (x is not base and not _same_order(x, base)):
            raise NotStructured
        return Slot.of(name, arrangement)

    def matrix(self, x: Tensor | None) -> Slot | None:
        """The slot of a 2-D tensor ``x [o, i]``: a parameter, its transpose, or a rectangular part of either."""
        parameter = self._parameter(x)
        if x is None or parameter is None:
            return None
        name, base = parameter
        o, i = x.shape
        if x is base:
            return Slot.of(name, Arrangement.plain(1, o, i))
        if not base.is_contiguous() or x.numel() == 0:
            raise NotStructured
        last = base.shape[-1] if base.ndim > 1 else base.numel()
        rs, cs = x.stride()
        if i == 1 and cs != 1:
            cs = 1 if rs >= last else last
        if o == 1 and cs == 1:
            rs = last
        offset, total = int(x.storage_offset() - base.storage_offset()), base.numel()
        if cs == 1 and rs >= i and total % rs == 0:
            row, column = divmod(offset, rs)
            if column + i <= rs:
                return Slot.of(name, Arrangement.plain(1, total // rs, rs), row, column)
        if (rs == 1 or o == 1) and cs >= o and total % cs == 0:
            column, row = divmod(offset, cs)
            if row + o <= cs:
                return Slot.of(name, Arrangement((1, total // cs, cs), (0, 2, 1), (1, cs, total // cs)), row, column)
        raise NotStructured

    def vector(self, x: Tensor | None, s: int = 1) -> Slot | None:
        """The slot of a bias ``x`` of ``s * o`` entries: a parameter, or for ``s = 1`` a run of neighbours of one, of
        any shape.
        """
        parameter = self._parameter(x)
        if x is None or parameter is None:
            return None
        name, base = parameter
        if s != 1 or x is base:
            return self.whole(x, Arrangement.plain(s, base.numel() // s, 1))
        return Slot.of(name, Arrangement.plain(1, base.numel(), 1), self.run(x, base))

    def run(self, x: Tensor, base: Tensor) -> int:
        """Where ``x``, a run of neighbours, starts in its parameter ``base``; raises where the entries are not
        neighbours in order.
        """
        if not x.is_contiguous() or not base.is_contiguous():
            raise NotStructured
        return int(x.storage_offset() - base.storage_offset())

    def table(self, x: Tensor) -> tuple[Slot, int]:
        """The slot of ``[i, o]`` for rows ``x`` of a parameter table, ``o`` its last axis, and the first row."""
        parameter = self._parameter(x)
        if parameter is None:
            raise NotStructured
        name, base = parameter
        width = x.shape[-1]
        first, inside = divmod(self.run(x, base), width)
        if base.shape[-1] != width or inside:
            raise NotStructured
        rows = base.numel() // width
        return Slot.of(name, Arrangement((1, rows, width), (0, 2, 1), (1, width, rows))), first


def _same_order(x: Tensor, base: Tensor) -> bool:
    """Whether a view that holds all of ``base`` keeps its order of elements."""
    return x.is_contiguous() and base.is_contiguous() and x.storage_offset() == base.storage_offset()
