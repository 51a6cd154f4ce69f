"""Named tensors of parameters as one flat tensor, and its sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError, CollectionError
from nngeom.core.given_plainly import described, require_whole
from nngeom.space.collection import LayerCollection


def require_collection(collection: Any) -> LayerCollection:
    """The parameters that something is over."""
    if not isinstance(collection, LayerCollection):
        raise ArgumentTypeError(
            f"the collection is {described(collection)}; expected LayerCollection.from_model(model), or the "
            "layer_collection of a matrix"
        )
    return collection


def joined(layer_collection: LayerCollection, tensors: Mapping[str, Tensor]) -> Tensor:
    """``(*batch, d)`` of one tensor ``(*batch, *shape)`` a parameter, a copy."""
    if not isinstance(tensors, Mapping):
        raise ArgumentTypeError(f"tensors is {described(tensors)}; expected a dict {{name: tensor}}")
    parts = []
    for name, shape in zip(layer_collection.names, layer_collection.shapes):
        if name not in tensors:
            raise CollectionError(f"no tensor for parameter {name!r}; got {list(tensors)[:6]}")
        t = tensors[name]
        given = tuple(t.shape) if isinstance(t, Tensor) else None
        if given is None or given[max(0, len(given) - len(shape)) :] != shape:
            told = described(t) if given is None else f"shape {given}"
            raise ArgumentError(f"the tensor for {name!r} has {told}; expected (*batch, {', '.join(map(str, shape))})")
        parts.append(t.reshape((*given[: len(given) - len(shape)], math.prod(shape))))
    extra = [n for n in tensors if n not in layer_collection]
    if extra:
        raise CollectionError(f"{extra[:6]} are not in the collection")
    flat = torch.cat(parts, -1)
    return flat.clone() if len(parts) == 1 else flat


def sizes(layer_collection: Any, batch: tuple[Any, ...]) -> tuple[int, ...]:
    """``(*batch, d)``, checked."""
    for size in batch:
        require_whole(size, "a number of vectors", 0)
    return (*batch, require_collection(layer_collection).numel)
