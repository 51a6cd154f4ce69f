"""The rows of one batch for some cotangents: what a statistic sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from nngeom.core.jacobian import LayerJacobian, tensors
from nngeom.core.layout import Layout
from nngeom.core.statistic import Named, Sums


@dataclass(frozen=True)
class Chunk:
    """What a statistic sees: the rows of one batch, for some of its cotangents.

    ``jacobians``: the rows of every block of parameters; ``examples``: ``n``; ``start``: the running index of the first
    of them; ``cotangents``: the first of these and how many there are in all, ``(lo, total)``.
    """

    jacobians: dict[Layout, LayerJacobian]
    examples: int
    start: int
    cotangents: tuple[int, int]

    @property
    def first(self) -> bool:
        """Whether these are the first cotangents of the batch: statistics of inputs alone are taken once."""
        return self.cotangents[0] == 0

    def nbytes(self, storages: set[int]) -> int:
        """Bytes beyond those of the ``storages`` held, which these join: chunks of one batch share its inputs."""
        new = {t.untyped_storage().data_ptr(): t for j in self.jacobians.values() for t in tensors(j)}
        new = {place: t for place, t in new.items() if place not in storages}
        storages.update(new)
        return sum(t.numel() * t.element_size() for t in new.values())


def added(sums: Sums, statistic: Callable[[Chunk], Named], chunks: Iterable[Chunk]) -> Sums:
    """The ``sums``, to which the ``statistic`` of all ``chunks`` is added in place."""
    for chunk in chunks:
        with torch.no_grad():
            sums.add(statistic, chunk)
    return sums
