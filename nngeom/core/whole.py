"""Tensors of which every process of a mesh holds a part (``DTensor``), read and made as wholes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

_WHOLE = frozenset((Tensor, nn.Parameter))  # kinds that are no distributed tensors; others are asked


def in_parts(x: Any) -> bool:
    """Whether ``x`` is a distributed tensor."""
    return type(x) not in _WHOLE and hasattr(x, "placements")


def whole(x: Tensor) -> Tensor:
    """``x``, gathered on all processes of its mesh where these hold parts of it; differentiable once."""
    full = None if type(x) in _WHOLE else getattr(x, "full_tensor", None)
    return x if full is None else full()


def local(x: Tensor) -> Tensor:
    """What this process holds of ``x``."""
    held = getattr(x, "to_local", None)
    return x if held is None else held()


def like(x: Tensor, other: Any) -> Tensor:
    """A whole tensor ``x``, the same on every process, in the form of ``other``: distributed where that is."""
    return _on_mesh(x, other, "Replicate") if in_parts(other) else x


def part_of(x: Tensor, other: Any) -> Tensor:
    """What this process holds of a whole ``x`` that is distributed as ``other``."""
    if not in_parts(other):
        return x
    spread: Any = like(x, other)
    return local(spread.redistribute(placements=other.placements))


def between(x: Tensor, other: Any) -> tuple[Tensor, Tensor]:
    """The least and the largest of what the processes of the mesh of ``other`` have as ``x``, entry by entry."""
    least, most = (_on_mesh(x, other, "Partial", reduction) for reduction in ("min", "max"))
    return whole(least), whole(most)


def _on_mesh(x: Tensor, other: Any, kind: str, *options: str) -> Tensor:
    distributed: Any = sys.modules["torch.distributed.tensor"]  # that of ``other``
    placements = [getattr(distributed, kind)(*options)] * other.device_mesh.ndim
    result: Tensor = distributed.DTensor.from_local(x, other.device_mesh, placements, run_check=False)
    return result


def gathered_from(x: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What all processes of its mesh hold of ``x`` put together, cast before it is sent; alone in its memory."""
    part = x.detach().to_local().to(device, dtype)
    options: dict[str, Any] = {"run_check": False, "shape": x.shape, "stride": x.stride()}
    full: Tensor = type(x).from_local(part, x.device_mesh, x.placements, **options).full_tensor().detach().contiguous()
    return full if full.untyped_storage().nbytes() == full.numel() * full.element_size() else full.clone()
