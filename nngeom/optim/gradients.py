"""``.grad`` of all parameters as one vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nngeom.core.linalg import accumulation_dtype
from nngeom.core.whole import in_parts, local, part_of, whole

SMALL = 2**16  # entries up to which a copy of all of them takes less time than products one by one


class Gradients:
    """``flat [d]`` is filled from ``.grad`` and emptied into it; its memory is kept between steps. Gradients in parts
    are read as wholes, by all processes together, and each writes its own part.
    """

    def __init__(self, parameters: Iterable[Tensor], dtype: torch.dtype):
        self.parameters = list(parameters)
        self.flat = torch.zeros(
            sum(p.numel() for p in self.parameters), dtype=accumulation_dtype(dtype), device=self.parameters[0].device
        )
        self._places = self.split(self.flat)
        self._pieces = list(self._places.values())
        self._in_parts = any(map(in_parts, self.parameters))  # and then gradients are
        self._before: Tensor | None = None  # all that was read, where it is small
        self._present: tuple[list[Tensor], list[Tensor]] = [], []  # pieces, and the gradients that were read into them

    def read(self) -> Tensor:
        """The gradients, zeros where there is none."""
        self._present = pieces, grads = self._look()
        if len(grads) < len(self.parameters):
            self.flat.zero_()
        if grads:
            torch._foreach_copy_(pieces, self._wholes(grads))
        self._before = self.flat.clone() if self.flat.numel() <= SMALL else None
        return self.flat

    def write(self, factor: float = 1.0) -> None:
        """Into every ``.grad`` that was read, times a ``factor``, as ``flat`` itself is then."""
        (pieces, grads), self._present = self._present, ([], [])
        if factor != 1:
            self.flat.mul_(factor)
        if self._in_parts:
            pieces, grads = [part_of(x, g) for x, g in zip(pieces, grads)], [local(g) for g in grads]
        if grads:
            torch._foreach_copy_(grads, pieces)

    def dot(self, parameters: Sequence[Tensor]) -> float:
        """The product of ``.grad`` of some ``parameters``, as it was read, and their pieces of ``flat``."""
        present = [p for p in parameters if p.grad is not None]
        if self._before is not None and len(present) == len(self.parameters):
            return float(torch.dot(self._before, self.flat))
        grads = [g.reshape(-1).to(self.flat.dtype) for g in self._wholes([p.grad for p in present])]  # type: ignore[misc]
        products = [torch.dot(x, self._places[p].reshape(-1)) for p, x in zip(present, grads)]
        return float(torch.stack(products).sum()) if products else 0.0

    def split(self, flat: Tensor) -> dict[Tensor, Tensor]:
        """The pieces of a vector ``[d]``, in the shapes of the parameters."""
        return {p: x.view(p.shape) for p, x in zip(self.parameters, flat.split([p.numel() for p in self.parameters]))}

    def _wholes(self, grads: list[Tensor]) -> list[Tensor]:
        return [whole(g) for g in grads] if self._in_parts else grads

    def _look(self) -> tuple[list[Tensor], list[Tensor]]:
        pieces: list[Tensor] = []
        grads: list[Tensor] = []
        for x, p in zip(self._pieces, self.parameters):
            g = p.grad
            if g is None:
                continue
            if g.is_sparse:  # of an embedding: preconditioned it is dense
                g = p.grad = g.to_dense()
            pieces.append(x)
            grads.append(g)
        return pieces, grads
