"""``.grad`` of all parameters as one vector."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nngeom.core.linalg import accumulation_dtype
from nngeom.core.whole import local, part_of, whole


class Gradients:
    """``flat [d]`` is filled from ``.grad`` and emptied into it; its memory is kept between steps. Gradients in parts
    are read as wholes, by all processes together, and each writes its own part.
    """

    def __init__(self, parameters: Iterable[Tensor], dtype: torch.dtype):
        self.parameters = list(parameters)
        self.flat = torch.zeros(
            sum(p.numel() for p in self.parameters), dtype=accumulation_dtype(dtype), device=self.parameters[0].device
        )
        self._split = self.split(self.flat)
        self._pieces = list(self._split.values())

    def read(self) -> Tensor:
        """The gradients, zeros where there is none."""
        pieces, grads = self._present()
        if len(grads) < len(self.parameters):
            self.flat.zero_()
        if grads:
            torch._foreach_copy_(pieces, [whole(g) for g in grads])
        return self.flat

    def write(self) -> None:
        """Into every ``.grad`` that there is."""
        pieces, grads = self._present()
        if grads:
            torch._foreach_copy_([local(g) for g in grads], [part_of(x, g) for x, g in zip(pieces, grads)])

    def by_parameter(self) -> dict[Tensor, Tensor]:
        """The pieces of ``flat``."""
        return self._split

    def split(self, flat: Tensor) -> dict[Tensor, Tensor]:
        """The pieces of a vector ``[d]``, in the shapes of the parameters."""
        return {p: x.view(p.shape) for p, x in zip(self.parameters, flat.split([p.numel() for p in self.parameters]))}

    def _present(self) -> tuple[list[Tensor], list[Tensor]]:
        for p in self.parameters:
            if p.grad is not None and p.grad.is_sparse:  # of an embedding: preconditioned it is dense
                p.grad = p.grad.to_dense()
        pairs = [(x, p.grad) for x, p in zip(self._pieces, self.parameters) if p.grad is not None]
        return [x for x, _ in pairs], [g for _, g in pairs]
