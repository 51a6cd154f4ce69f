"""Inverses of damped Kronecker factors most of whose eigenvalues the damping drowns.

Where damping adds ``r`` to a factor, those of its eigenvalues below ``drowned r`` count as their mean ``t``:
``(F + r)^-1`` is taken to be ``z + U w U^T`` with ``z = 1 / (t + r)``, and ``w = 1 / (s + r) - z`` for the others,
``s``, and their eigenvectors ``U [p, k]``. Along the drowned ones it is off by a factor of ``1 + drowned`` at most. A
product takes ``2 p k`` multiplications in place of ``p^2``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.damping import Damping, FactoredTikhonov, Relative
from nngeom.core.sketch import side_of
from nngeom.optim.heads import Rows, random_columns, turned
from nngeom.pmat.block import Block, TensorObject
from nngeom.pmat.kronecker import KroneckerBlock

Side = tuple[Tensor, ...]  # the inverse ``[s, p, p]`` or ``[s, p]``, or ``z [s]``, ``w [s, k]`` and ``U [s, p, k]``
LEAST, SHARE = 64, 8  # sides up to which, and parts of a side above which, the whole inverse is as cheap
FIRST, ROUNDS = 16, 3  # eigenvectors looked for at first, and steps of orthogonal iteration
FAR = 4.0  # times the floor, above which more of them will not do


@dataclass(frozen=True, eq=False)
class Drowned(TensorObject):
    """``(A + r_A)^-1 (x) (G + r_G)^-1``, each side whole or by its leading eigenvectors."""

    a: Side
    g: Side

    @property
    def costs(self) -> tuple[int, int]:
        """Multiplications of one row's product with ``g`` and with ``a``."""
        return _cost(self.g), _cost(self.a)

    def product(self, x: Tensor, rows: Rows) -> Tensor:
        """Of a gradient ``x [s, o, i]``, through its ``rows`` where they are given."""
        if rows is None:
            return _times(_times(x.mT, self.g).mT, self.a)
        d, a = rows
        return _times(d[None], self.g).mT @ _times(a[None], self.a)


Block.kinds.add(Drowned)


def drowned_inverse(block: KroneckerBlock, damping: Damping | Relative, drowned: float) -> Drowned | None:
    """The inverse of a ``block`` under a ``damping`` of its factors; ``None`` where no side has few eigenvalues above
    ``drowned`` times what damping adds, or damping is not of factors.
    """
    sides = side_of(block.a), side_of(block.g)
    if max(sides) <= LEAST or min(sides) == 1 or not _of_factors(damping):
        return None
    shifts = _shifts(block, damping)
    led = [_led(f, r, drowned) for f, r in zip((block.a, block.g), shifts)]
    if led == [None, None]:
        return None
    words = ("the damped input factor", "the damped gradient factor")
    a, g = (
        (linalg.factor_inverse(linalg.factor_shift(f, r), what),) if side is None else side
        for f, r, side, what in zip((block.a, block.g), shifts, led, words)
    )
    return Drowned(a, g)


def _of_factors(damping: Damping | Relative) -> bool:
    return isinstance(damping, FactoredTikhonov) or (isinstance(damping, Relative) and damping.factored)


def _shifts(block: KroneckerBlock, damping: Damping | Relative) -> tuple[Tensor, Tensor]:
    if isinstance(damping, FactoredTikhonov):
        return block.shifts(damping)
    a, g = (float(damping.value) ** 0.5 * linalg.factor_diag(f).mean(-1) for f in (block.a, block.g))
    return a, g


def _led(factor: Tensor, shift: Tensor, drowned: float) -> Side | None:
    """``z``, ``w`` and ``U`` of one factor, where few eigenvalues are above ``drowned * shift [s]``."""
    side = factor.shape[-1]
    if linalg.is_diagonal(factor) or side <= LEAST or bool((shift <= 0).any()):
        return None
    found = _leading(factor, drowned * shift.unsqueeze(-1), side // SHARE)
    if found is None:
        return None
    values, u = found
    tail = (linalg.factor_diag(factor).sum(-1) - values.sum(-1)).clamp_min(0) / (side - values.shape[-1])
    z = 1 / (tail + shift)
    return z, 1 / (values + shift.unsqueeze(-1)) - z.unsqueeze(-1), u


def _leading(factor: Tensor, floor: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues above the ``floor [s, 1]``, descending, and their eigenvectors; ``None`` for more than ``most``."""
    u, count = factor.new_zeros(len(factor), factor.shape[-1], 0), FIRST
    while count <= most:
        u = torch.cat([u, random_columns(u, count)], -1)
        for _ in range(ROUNDS):
            u, _ = turned(factor, u)
        values, turn = linalg.eigh(u.mT @ factor @ u)
        values, u = values.flip(-1), u @ turn.flip(-1)
        if bool((values[..., -1:] <= floor).all()):
            k = int((values > floor).sum(-1).max())
            return values[..., :k].clamp_min(0), u[..., :k].contiguous()
        if count > FIRST and bool((values[..., -1:] > FAR * floor).any()):
            return None
        count *= 2
    return None


def _cost(side: Side) -> int:
    if len(side) == 1:
        return side[0].shape[-1] ** (side[0].ndim - 1)
    return 2 * side[2].shape[-2] * side[2].shape[-1]


def _times(x: Tensor, side: Side) -> Tensor:
    """``x [s, r, p]`` times the inverse, which is symmetric."""
    if len(side) == 1:
        return linalg.right(x, side[0])
    z, w, u = side
    return torch.baddbmm(x * z[:, None, None], (x @ u) * w.unsqueeze(-2), u.mT)
