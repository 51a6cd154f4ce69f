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
        self._before: Tensor | None = None  # all that was read, where it is small

    def read(self) -> Tensor:
        """The gradients, zeros where there is none."""
        pieces, grads = self._present()
        if len(grads) < len(self.parameters):
            self.flat.zero_()
        if grads:
            torch._foreach_copy_(pieces, [whole(g) for g in grads])
        self._before = self.flat.clone() if self.flat.numel() <= SMALL else None
        return self.flat

    def write(self, factor: float = 1.0) -> None:
        """Into every ``.grad`` that there is, times a ``factor``."""
        pieces, grads = self._present()
        if factor != 1:
            pieces = [torch.mul(x, factor, out=g) if _alike(x, g) else x * factor for x, g in zip(pieces, grads)]
        pairs = [(x, g) for x, g in zip(pieces, grads) if x is not g]
        if pairs:
            torch._foreach_copy_([local(g) for _, g in pairs], [part_of(x, g) for x, g in pairs])

    def dot(self, parameters: Sequence[Tensor]) -> float:
        """The product of ``.grad`` of some ``parameters``, as it was read, and their pieces of ``flat``."""
        present = [p for p in parameters if p.grad is not None]
        if self._before is not None and len(present) == len(self.parameters):
            return float(torch.dot(self._before, self.flat))
        grads = [whole(p.grad).reshape(-1).to(self.flat.dtype) for p in present]  # type: ignore[arg-type]
        products = [torch.dot(x, self._places[p].reshape(-1)) for p, x in zip(present, grads)]
        return float(torch.stack(products).sum()) if products else 0.0

    def split(self, flat: Tensor) -> dict[Tensor, Tensor]:
        """The pieces of a vector ``[d]``, in the shapes of the parameters."""
        return {p: x.view(p.shape) for p, x in zip(self.parameters, flat.split([p.numel() for p in self.parameters]))}

    def _present(self) -> tuple[list[Tensor], list[Tensor]]:
        for p in self.parameters:
            if p.grad is not None and p.grad.is_sparse:  # of an embedding: preconditioned it is dense
                p.grad = p.grad.to_dense()
        pairs = [(x, p.grad) for x, p in zip(self._pieces, self.parameters) if p.grad is not None]
        return [x for x, _ in pairs], [g for _, g in pairs]


def _alike(x: Tensor, y: Tensor) -> bool:
    return not in_parts(y) and x.dtype == y.dtype
