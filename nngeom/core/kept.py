"""What a sum over examples is, without its numbers: the same in two processes where these can be added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

Key = tuple[Any, str]  # the block, and the name of the statistic


@dataclass(frozen=True)
class Kept:
    """Of one statistic: its ``shape``, ``[p]`` of rows that are stacked; ``half``: entries below the diagonal are
    missing; ``inputs``: it is of inputs alone.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stacked: bool = False
    half: bool = False
    inputs: bool = False


def union(manifests: Iterable[Mapping[Key, Kept]]) -> tuple[dict[Key, Kept], list[tuple[Key, list[Kept | None]]]]:
    """What there is in any, in the order of the first that has it, and those that cannot be added up, with what each
    has.
    """
    listed = list(manifests)
    out: dict[Key, Kept] = {}
    odd = []
    for key in {key: None for mine in listed for key in mine}:
        there = [mine[key] for mine in listed if key in mine]
        if len({(k.shape, k.stacked) for k in there}) > 1:
            odd.append((key, [mine.get(key) for mine in listed]))
        dtype = there[0].dtype
        for k in there[1:]:
            dtype = torch.promote_types(dtype, k.dtype)
        out[key] = replace(there[0], dtype=dtype, half=all(k.half for k in there), inputs=any(k.inputs for k in there))
    return out, odd
