"""Room for a vector in the order of its blocks: what acts on numbers acts once on all of them, what acts on matrices
needs no copy.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nngeom.core.layout import Layout


class Packed:
    """Blocks ``[s, o, i]`` one after the other in ``flat [p]``, exchanged with their places in another ``vector
    [d]``.
    """

    def __init__(self, layouts: Iterable[Layout], vector: Tensor):
        self.layouts, self.vector = tuple(layouts), vector
        self.flat = vector.new_zeros(sum(layout.numel for layout in self.layouts))
        self.blocks = split(self.flat, self.layouts)
        self._here: list[Tensor] = []
        self._there: list[Tensor] = []
        for layout, block in zip(self.layouts, self.blocks):
            columns = block.split([piece.arrangement.sizes[2] for piece in layout.pieces], -1)
            self._here += [piece.arrangement.unfolded(part) for piece, part in zip(layout.pieces, columns)]
            self._there += [piece.arrangement.folded(vector[piece.offset : piece.stop]) for piece in layout.pieces]

    def read(self) -> None:
        """From the vector."""
        torch._foreach_copy_(self._here, self._there)

    def write(self) -> None:
        """Into the vector; places outside the blocks stay as they are."""
        torch._foreach_copy_(self._there, self._here)


def split(flat: Tensor, layouts: tuple[Layout, ...]) -> list[Tensor]:
    """``[p]`` as views ``[s, o, i]``."""
    return [x.view(layout.sizes) for x, layout in zip(flat.split([layout.numel for layout in layouts]), layouts)]
