"""What processes must have in common, in few bytes: settings as texts, tensors as sums of their bits."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nngeom.core.whole import local

PIECE = 2**22  # numbers that are widened at once
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest_of(x: object) -> str:
    """A short text that differs, but by chance of 2^-64, for objects whose ``repr`` differs."""
    return hashlib.blake2b(repr(x).encode(), digest_size=8).hexdigest()


def bits(tensors: Iterable[Tensor]) -> list[str]:
    """A short text of the numbers in each tensor, of a distributed one in its part here: two sums of its bits, in whole
    numbers, so that neither the order of summation nor the device changes them.
    """
    sums = [_sums(local(t.detach())) for t in tensors]
    if not sums:
        return []
    pairs = torch.stack([s.cpu() for s in sums]).tolist() if len({s.device for s in sums}) > 1 else None
    pairs = torch.stack(sums).tolist() if pairs is None else pairs
    return [f"{a & 0xFFFFFFFFFFFFFFFF:016x}{b & 0xFFFFFFFFFFFFFFFF:016x}" for a, b in pairs]


def _sums(t: Tensor) -> Tensor:
    if t.layout is not torch.strided:
        t = t.to_dense()
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    flat = (t.resolve_neg() if t.is_neg() else t).contiguous().view(-1)
    total = torch.zeros(2, dtype=torch.int64, device=t.device)
    for lo in range(0, flat.numel(), PIECE):
        part = flat[lo : lo + PIECE]
        part = (part.view(torch.uint8) if part.dtype is torch.bool else part.view(_WHOLE[part.element_size()])).long()
        place = torch.arange(lo + 1, lo + 1 + part.numel(), device=t.device)
        mixed = (part ^ (place * -7046029254386353131)) * -4658895280553007687  # splitmix64's constants
        total += torch.stack([part.sum(), (mixed ^ (mixed >> 29)).sum()])
    return total


def described(x: Any, depth: int = 8) -> str:
    """An object as a text that is the same in every process for the same settings: no addresses, no order of sets;
    ``depth``: how far what it holds is looked into.
    """
    if depth == 0:
        return type(x).__qualname__
    inner = functools.partial(described, depth=depth - 1)
    if isinstance(x, Tensor):
        return f"tensor {tuple(x.shape)} {x.dtype} {bits([x])[0]}"
    if isinstance(x, (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device, enum.Enum)):
        return repr(x)
    if isinstance(x, type):
        return f"{x.__module__}.{x.__qualname__}"
    if dataclasses.is_dataclass(x):
        return _named(x, {f.name: inner(getattr(x, f.name)) for f in dataclasses.fields(x)})
    if isinstance(x, Mapping):
        return f"{{{', '.join(sorted(f'{inner(k)}: {inner(v)}' for k, v in x.items()))}}}"
    if isinstance(x, (set, frozenset)):
        return f"{{{', '.join(sorted(map(inner, x)))}}}"
    if isinstance(x, Sequence):
        return f"[{', '.join(map(inner, x))}]"
    if hasattr(x, "__qualname__"):
        return f"{getattr(x, '__module__', '')}.{x.__qualname__}"
    own = {name: inner(value) for name, value in getattr(x, "__dict__", {}).items() if not name.startswith("_")}
    return _named(x, own)


def _named(x: Any, values: dict[str, str]) -> str:
    return f"{type(x).__qualname__}({', '.join(f'{name}={text}' for name, text in values.items())})"


def difference(values: Sequence[Mapping[str, str]]) -> str | None:
    """The first name whose values differ over ranks, and who has which; ``None`` where there is none."""
    for name in {name: None for mine in values for name in mine}:
        held: dict[str, list[int]] = {}
        for rank, mine in enumerate(values):
            held.setdefault(mine.get(name, "not there"), []).append(rank)
        if len(held) > 1:
            said = (f"{text} on {ranks_text(ranks)}" for text, ranks in held.items())
            return f"{name} is {', '.join(said)}"
    return None


def ranks_text(ranks: Sequence[int]) -> str:
    """``rank 1``, ``ranks 0, 2``, at most eight of them."""
    listed = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"
