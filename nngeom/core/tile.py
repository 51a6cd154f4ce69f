"""The sum of the products of all pairs of gradients of two sets of examples, and working memory for adding to it."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core import costs, linalg, memory
from nngeom.core.jacobian import LayerJacobian


class Tile:
    """The sum ``out[k, n, l, m]`` of the products of two sets of rows.

    Rows lie in memory by outputs, ``(k n)``, or ``by_examples``, ``(n k)``: so rows summed over positions are formed
    for all outputs of an example in one product. Of two times the same rows, only what lies above the diagonal is
    complete, about half of the work, until :meth:`result` mirrors it. All layers share one piece of working memory.
    """

    def __init__(self, x: LayerJacobian, y: LayerJacobian, *, by_examples: bool = False) -> None:
        (self.k, self.n), (self.l, self.m) = x.shape[:2], y.shape[:2]
        self.symmetric, self.by_examples = x is y, by_examples or self.k == 1
        self.flat = torch.zeros(
            self.k * self.n, self.l * self.m, dtype=linalg.accumulation_dtype(x.dtype), device=x.device
        )
        self._working = memory.Working()

    def working(self, name: str, *sizes: int) -> Tensor:
        """Uninitialised memory that the next call with the same name overwrites."""
        return self._working(name, sizes, self.flat)

    @property
    def out(self) -> Tensor:
        """``[k, n, l, m]``, in whichever order it lies."""
        if self.by_examples:
            return self.flat.view(self.n, self.k, self.m, self.l).permute(1, 0, 3, 2)
        return self.flat.view(self.k, self.n, self.l, self.m)

    def widen(self, dtype: torch.dtype) -> None:
        """Go on in this dtype where it is the wider one."""
        self.flat = self.flat.to(torch.promote_types(self.flat.dtype, dtype))

    def rows(self, x: Tensor) -> Tensor:
        """``[k, n, *p] -> [r, p]``, in the order of the tile."""
        return (x.transpose(0, 1) if self.by_examples else x).flatten(2).flatten(0, 1)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Products of explicit rows ``x [r, p]``, ``y [q, p]``, in the order of the tile."""
        for lo, hi in linalg.strips(len(x)) if self.symmetric else ((0, len(y)),):
            last = hi if self.symmetric else len(x)
            self.flat[:last, lo:hi].addmm_(x[:last], y[lo:hi].T)

    def add_scaled(self, x: Tensor, y: Tensor, scale: Tensor) -> None:
        """``out[k, n, l, m] += scale[n, m] <x[k, n], y[l, m]>`` for rows ``x [k, n, p]``, ``y [l, m, p]``."""
        left, right = self.rows(x), self.rows(y)
        inner, across = (self.k, self.l) if self.by_examples else (self.n, self.m)
        rows, columns = left.shape[0], right.shape[0]
        least = costs.LEAST_ROWS if torch.get_num_threads() == 1 else costs.SHARED_ROWS
        step = max(-(-rows // inner // 16), -(-least // inner)) * inner  # some outputs of all examples, or all of some
        if rows * columns <= costs.SMALL_PRODUCT:
            step = rows
        for lo in range(0, rows, step):
            hi, first = min(rows, lo + step), lo // inner * across if self.symmetric else 0
            products = torch.mm(left[lo:hi], right[first:].T, out=self.working("products", hi - lo, columns - first))
            sizes = (hi - lo) // inner, inner, (columns - first) // across, across
            part = self.flat[lo:hi, first:].view(sizes)
            factor = scale[lo // inner : hi // inner, first // across :, None] if self.by_examples else scale
            part.addcmul_(products.view(part.shape), factor.unsqueeze(1))

    def result(self) -> Tensor:
        """``[k, n, l, m]``, with the part below the diagonal filled in."""
        self._working = memory.Working()
        if self.symmetric:
            linalg.mirror_(self.flat, corners=True)
        return self.out.contiguous()
