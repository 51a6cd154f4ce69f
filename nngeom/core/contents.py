"""What is in a batch or a tensor, as a short text that says whether another one is the same."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError


def digest(x: Any) -> str:
    """Of all that is in ``x``, however deep; raises :class:`ArgumentError` for what has no contents."""
    found = hashlib.sha256()
    for leaf in _leaves(x):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_quantized:
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            t = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
            found.update(t.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
            found.update(f"{leaf.dtype}{leaf.shape}".encode())
            found.update(np.ascontiguousarray(leaf).view(np.uint8).data)
        elif leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes)):
            found.update(f"{type(leaf).__name__}{leaf!r}".encode())
        else:
            found.update(_pickled(leaf))
    return found.hexdigest()[:32]


def _pickled(x: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(x, buffer) if isinstance(x, Tensor) else pickle.dump(x, buffer)
    except Exception as error:
        raise ArgumentError(
            f"a batch holds a {type(x).__name__}, by which a file cannot know it again: {error}; expected tensors, "
            "numbers, text, and dictionaries, lists and tuples of these"
        ) from error
    return buffer.getvalue()


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, Mapping):
        yield f"dict of {len(x)}"
        for name, value in x.items():
            yield name
            yield from _leaves(value)
    elif isinstance(x, (tuple, list)):
        yield f"{len(x)} items"
        for item in x:
            yield from _leaves(item)
    else:
        yield x
