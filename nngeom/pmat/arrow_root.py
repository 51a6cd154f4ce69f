"""A root of an arrow matrix a unit, by its Cholesky factor: in far less time than eigenvectors of all units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.pmat.closed import Weighted
from nngeom.pmat.quasi_diag import ArrowBlock


@dataclass(frozen=True, eq=False)
class ArrowRoot:
    """``L`` of ``L L^T = M + x I``: roots ``d [s, o, i]`` of its pivots, and its last row ``c [s, o, i-1]``."""

    d: Tensor
    c: Tensor

    @staticmethod
    def of(m: ArrowBlock, x: float | Tensor) -> ArrowRoot | None:
        """``None`` where a pivot of ``M + x I`` is not positive to rounding."""
        d = m.d + x
        w = d[..., :-1]
        tiny = 4 * torch.finfo(d.dtype).eps * d.detach().abs().amax(-1, keepdim=True)
        if not bool((w > tiny).all()):
            return None
        last = d[..., -1:] - (m.c.square() / w).sum(-1, keepdim=True)
        if not bool((last > tiny).all()):
            return None
        return ArrowRoot(torch.cat([w, last], -1).sqrt(), m.c / w.sqrt())

    def times(self, x: Tensor) -> Tensor:
        """``L x``, ``[*b, s, o, i]``."""
        last = (self.c * x[..., :-1]).sum(-1, keepdim=True)
        y = self.d * x
        return torch.cat([y[..., :-1], y[..., -1:] + last], -1)


def split_arrow(terms: Sequence[Weighted], x: float | Tensor) -> tuple[ArrowRoot, list[Weighted]] | None:
    """A root of the only arrow of ``terms`` with ``x`` on its diagonal, and the other terms; ``None`` where there is
    not one, or no root.
    """
    arrows = [(w, part) for w, part in terms if isinstance(part, ArrowBlock)]
    if len(arrows) != 1:
        return None
    ((w, part),) = arrows
    root = ArrowRoot.of(part.scaled(w), x)
    return None if root is None else (root, [t for t in terms if t[1] is not part])
