"""A loader that says what it gave: whether every pass over it saw the same examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nngeom.capture.batch import tensors
from nngeom.capture.loaders import as_batches
from nngeom.capture.network import Batch

MASK = 0xFFFFFFFFFFFFFFFF


class Watched:
    """The batches of a ``loader``; ``seen`` are digests of its passes so far, those that were gone through to the end.

    In the digest of a pass the numbers of all examples count, not their order; with ``ordered=True`` that too. An
    iterator is kept as a list.
    """

    def __init__(self, loader: Any, *, ordered: bool = False) -> None:
        source = as_batches(loader)
        self.source = list(source) if isinstance(source, Iterator) else source
        self.ordered = ordered
        self.seen: set[str] = set()

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        total, order = [0, 0], hashlib.sha256()
        for batch in self.source:
            mine = [sum(sums) & MASK for sums in zip(*map(_sums, tensors(batch)))] or [0, 0]
            total = [(x + y) & MASK for x, y in zip(total, mine)]
            order.update(repr(mine).encode())
            yield batch
        self.seen.add(f"{total[0]:016x}{total[1]:016x}" + (order.hexdigest() if self.ordered else ""))


def _sums(t: Tensor) -> tuple[int, int]:
    """Two sums of the bits of all numbers, whatever their order."""
    flat = t.detach().to_dense() if t.layout is not torch.strided else t.detach()
    flat = (torch.view_as_real(flat.resolve_conj()) if flat.is_complex() else flat).contiguous().view(-1)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    part = flat.view(whole).long()
    mixed = part * -4658895280553007687
    mixed = (mixed ^ (mixed >> 29)) * -7046029254386353131
    return int(part.sum()) & MASK, int((mixed ^ (mixed >> 32)).sum()) & MASK
