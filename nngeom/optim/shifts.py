"""What damping adds to every coordinate of a spectrum in eigenbases."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nngeom.core.damping import Cutoff, Damping, FactoredTikhonov, Relative
from nngeom.core.errors import SingularError
from nngeom.core.layout import Layout
from nngeom.optim.bases import Kept
from nngeom.optim.heads import Head, Inverse
from nngeom.pmat.shifted import spectrum_shift

Tail = tuple[Inverse, tuple[int, int]]


class Shifts:
    """The damping of every coordinate, kept while bases and damping stay where it depends on nothing else."""

    def __init__(self) -> None:
        self._kept: tuple[Damping | Relative, Tensor | float] | None = None
        self._tails: tuple[Damping | Relative, dict[Layout, Tail]] | None = None

    def forget(self) -> None:
        """There are new bases."""
        self._kept = self._tails = None

    def tails(self, blocks: dict[Layout, Kept], damping: Damping | Relative, power: float) -> dict[Layout, Tail]:
        """What heads among the ``blocks`` do outside of themselves: their inverse to the ``-power``, and how many
        eigenvectors of either side stand out.
        """
        if self._tails is None or (self._tails[0] is not damping and self._tails[0] != damping):
            heads = {layout: block for layout, block in blocks.items() if isinstance(block, Head)}
            made = {lay: (head.inverse(damping, power), head.large(damping, power)) for lay, head in heads.items()}
            self._tails = (damping, made)
        return self._tails[1]

    def of(self, blocks: dict[Layout, Kept], d: Tensor, damping: Damping | Relative) -> Tensor | float:
        """What is added to the spectrum ``d [p]`` of the ``blocks``; infinity where a cutoff makes it count as zero."""
        if isinstance(damping, Cutoff):
            return self._cut(d, damping)
        if isinstance(damping, Relative) and not damping.factored:
            return _flat(blocks, [float(damping.value) * x.mean() for x in views(d, blocks)])
        if self._kept is None or (self._kept[0] is not damping and self._kept[0] != damping):
            self._kept = (damping, self._constant(blocks, d, damping))
        shift = self._kept[1]
        if isinstance(shift, float) and shift == 0:
            self._require_regular(d)
        return shift

    def _constant(self, blocks: dict[Layout, Kept], d: Tensor, damping: Damping | Relative) -> Tensor | float:
        x = float(damping.value)
        if not isinstance(damping, (FactoredTikhonov, Relative)) or x == 0:
            return x
        return _flat(blocks, [_shift(b, part, damping) for b, part in zip(blocks.values(), views(d, blocks))])

    @staticmethod
    def _cut(d: Tensor, damping: Cutoff) -> Tensor:
        least = max(damping.value, torch.finfo(d.dtype).tiny)
        if damping.top is not None and damping.top < d.numel():
            noise = float(d.max()) * torch.finfo(d.dtype).eps
            least = max(least, float(d.topk(damping.top).values[-1]) - noise, noise)
        return torch.where(d >= least, 0.0, math.inf)

    @staticmethod
    def _require_regular(d: Tensor) -> None:
        floor = d.abs().max() * torch.finfo(d.dtype).eps * d.numel()
        if bool((d <= floor).any()):
            raise SingularError(
                "the matrix in its eigenbasis is singular at this damping: its smallest eigenvalue is "
                f"{float(d.min()):.3e}; use a positive damping, or Cutoff(x) for a pseudo-inverse"
            )


def views(flat: Tensor, blocks: dict[Layout, Kept]) -> list[Tensor]:
    """``flat [p]`` in the shapes of the spectra of the ``blocks``."""
    shapes = [block.d.shape for block in blocks.values()]
    return [x.view(shape) for x, shape in zip(flat.split_with_sizes([shape.numel() for shape in shapes]), shapes)]


def _shift(block: Kept, d: Tensor, damping: FactoredTikhonov | Relative) -> Tensor | float:
    if isinstance(block, Head):
        return block.shift(damping)
    if isinstance(damping, FactoredTikhonov):
        return block.additive(float(damping.value))
    shift = spectrum_shift(block, math.sqrt(damping.value))
    return float(damping.value) * d.mean() if shift is None else shift


def _flat(blocks: dict[Layout, Kept], shifts: list[Tensor | float]) -> Tensor:
    return torch.cat([(torch.zeros_like(b.d) + x).view(-1) for b, x in zip(blocks.values(), shifts)])
