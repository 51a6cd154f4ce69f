"""Kronecker factors damped relative to their own mean eigenvalues."""

from __future__ import annotations

import functools
from dataclasses import replace

from torch import Tensor

from nngeom.core import linalg
from nngeom.pmat.block import Block
from nngeom.pmat.eigenvalues import relative_shift
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock


@functools.singledispatch
def factors_shifted(block: Block, c: float | Tensor) -> Block | None:
    """Each of two factors of a ``block`` plus ``c`` times its mean eigenvalue; ``None`` where there are no two."""
    return None


@factors_shifted.register
def _(block: KroneckerBlock, c: float | Tensor) -> KroneckerBlock | None:
    a, g = (linalg.factor_shift(f, c * linalg.factor_diag(f).mean(-1)) for f in (block.a, block.g))
    return None if block.g.shape[-1] == 1 else KroneckerBlock(a, g)


@factors_shifted.register
def _(block: EigenBlock, c: float | Tensor) -> EigenBlock | None:
    shift = spectrum_shift(block, c)
    return None if shift is None else replace(block, d=block.d + shift)


def spectrum_shift(block: EigenBlock, c: float | Tensor) -> Tensor | None:
    """``c^2 m_A m_B + c (s_A m_B + m_A s_B)``: what damping of the factors by ``c`` times their mean eigenvalues ``m``
    adds to the spectrum of a ``block``, if it has two.
    """
    if block.sa is None or block.sg is None or block.sg.shape[-1] == 1:
        return None
    return relative_shift(block.sa.unsqueeze(-2), block.sg.unsqueeze(-1), c)
