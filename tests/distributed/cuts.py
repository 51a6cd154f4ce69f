"""Data cut over processes, and how a result of many is compared with that of one."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case, build

import nngeom as nng

SIZES = (3, 4, 2, 5)  # of the batches of one process
CUTS = {2: (2,), 3: (1, 1), 4: (1, 1, 3)}  # after which batches the next rank takes over: rank 1 of 3 has none


def data(name: str) -> Case:
    """A case of the zoo in several batches."""
    return build(name, sizes=SIZES)


def mine(loader: list[Any], rank: int, size: int) -> list[Any]:
    """The batches of a rank, joined where there are several and the rank is odd: batches differ, numbers must not."""
    ends = (0, *CUTS[size], len(loader))
    part = loader[ends[rank] : ends[rank + 1]]
    if rank % 2 and len(part) > 1:
        return [tuple(map(torch.cat, zip(*part)))]
    return part


def tensors(x: Any) -> list[torch.Tensor]:
    """All numbers of a matrix."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, nng.MatrixEstimate):
        return [t for m in (x.matrix, *x.draws) for t in tensors(m)]
    held = []
    for block in x.blocks.values():
        for value in block.fields().values():
            held += [t for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, torch.Tensor)]
    return held


def close(x: torch.Tensor, y: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Equal relative to the largest entry."""
    assert x.shape == y.shape, (x.shape, y.shape)
    scale = float(y.abs().max().clamp_min(1e-30)) if y.numel() else 1.0
    difference = float((x - y).abs().max()) / scale if y.numel() else 0.0
    assert difference <= tolerance, f"they differ by {difference:.1e}"
