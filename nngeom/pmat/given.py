"""Matrices from tensors that were not measured here: checked before they are believed, and copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import (
    ArgumentError,
    ArgumentTypeError,
    CollectionError,
    DeviceError,
    NonFiniteError,
    StructureError,
)
from nngeom.space.collection import LayerCollection

ROUNDING = 1000  # units in the last place of the largest entry, by which a symmetric matrix may differ from its mirror


def require_entries(x: Any, what: str, *shape: int | None) -> Tensor:
    """A copy of the tensor ``x``: real floating-point, finite, of this ``shape`` (``None``: any size)."""
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"{what} is {type(x).__name__}; expected a tensor")
    if not x.is_floating_point():
        raise ArgumentTypeError(f"{what} is {x.dtype}; expected real floating-point numbers")
    if x.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, x.shape)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ArgumentError(f"{what} has shape {tuple(x.shape)}; expected ({expected})")
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(f"{what} contains NaN or infinity; expected finite numbers")
    return x.clone()


def require_symmetric(x: Tensor, what: str) -> Tensor:
    """``x [..., p, p]`` without what rounding left between it and its mirror; :class:`ArgumentError` for more."""
    if not x.numel():
        return x
    off, scale = (x - x.mT).detach().abs().max(), x.detach().abs().max()
    if bool(off > ROUNDING * torch.finfo(x.dtype).eps * scale):
        raise ArgumentError(
            f"{what} is not symmetric: entries differ from their mirror by up to {off.item():.3e}; expected a "
            "symmetric matrix, such as (m + m.mT) / 2"
        )
    return (x + x.mT) / 2


def require_square(x: Any, side: int, what: str) -> Tensor:
    """A copy of a symmetric matrix of this side."""
    return require_symmetric(require_entries(x, what, side, side), what)


def require_count(examples: Any) -> int:
    """How many examples a matrix is said to be a mean over."""
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 0:
        raise ArgumentError(f"examples is {examples!r}; expected a number of examples, 0 or more")
    return examples


def require_mapping(given: Any, value: str) -> Mapping[Any, Any]:
    """``{layer: value}``."""
    if not isinstance(given, Mapping):
        raise ArgumentTypeError(f"got {type(given).__name__}; expected a dict {{layer: {value}}}")
    return given


def require_cover(collection: LayerCollection, named: list[str]) -> None:
    """Every parameter of the collection once."""
    missing = [name for name in collection.names if name not in set(named)]
    if missing:
        raise CollectionError(
            f"nothing is given for parameters {missing[:4]}; expected the layers {list(collection.by_layer())[:8]}, "
            "or a smaller collection"
        )
    twice = sorted({name for name in named if named.count(name) > 1}) if len(named) > len(set(named)) else []
    if twice:
        raise StructureError(f"parameters {twice[:4]} are given twice; expected each of them once")


def foreign(collection: LayerCollection, key: Any) -> CollectionError:
    """The error for a key that is none of the collection's."""
    return CollectionError(f"{key!r} is no layer of the collection; its layers are {list(collection.by_layer())[:8]}")


def require_alike(tensors: list[Tensor]) -> None:
    """One dtype and one device."""
    if len({t.dtype for t in tensors}) > 1:
        raise ArgumentError(
            f"the tensors have the dtypes {sorted({str(t.dtype) for t in tensors})}; expected one: .to(dtype) of each"
        )
    if len({t.device for t in tensors}) > 1:
        raise DeviceError(
            f"the tensors are on {sorted({str(t.device) for t in tensors})}; expected one device: .to(device) of each"
        )
