"""In which order a model has sorted the sequences of a batch before packing them, seen while it runs.

``pack_padded_sequence(enforce_sorted=False)`` selects examples by decreasing length and then packs them; what it packs
is told apart by identity, while the model holds it. It is a hint: where rows lie is proved of every batch.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class SortedSequences:
    """The orders of packed tensors, by their identity."""

    def __init__(self) -> None:
        self._orders: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def see(self, func: Any, args: Any, out: Any) -> None:
        """Look at a call: of a selection of all examples, or of what packs one."""
        if func is Tensor.index_select and len(args) == 3:
            x, axis, index = args
            if index.ndim == 1 and len(index) == x.shape[axis]:
                self._remember(out, index)
        elif func is torch._VF._pack_padded_sequence and (order := self.of(args[0])) is not None:
            if torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
                self._remember(out[0], order)

    def of(self, x: Any) -> Tensor | None:
        """The places in the batch of what was sorted into ``x``, ``(n,)``; ``None`` where nothing was."""
        entry = self._orders.get(id(x))
        return entry[1] if entry is not None and entry[0]() is x else None

    def _remember(self, x: Tensor, order: Tensor) -> None:
        self._orders[id(x)] = weakref.ref(x), order
