"""Batches as people have them: how examples are moved, counted and taken.

A batch is any nesting of tensors in tuples, lists, named tuples, mappings and dataclasses; it comes back in the same
containers. A bare tensor given as one of several batches becomes ``(tensor,)``, so that what was once told apart from
the parts of one batch stays so.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset

from nngeom.core.errors import ArgumentError, ArgumentTypeError, LoaderError

Batch = Any
LEAVES = (Tensor, np.ndarray, PackedSequence)


def is_record(x: Any) -> bool:
    """Whether ``x`` is an instance of a dataclass."""
    return dataclasses.is_dataclass(x) and not isinstance(x, type)


def one_batch(batch: Batch) -> list[Batch]:
    """``[batch]``; raises :class:`ArgumentTypeError` for what gives batches: a loader, a data set, a list of tuples."""
    listed = isinstance(batch, list) and len(batch) > 0 and all(type(x) is tuple for x in batch)
    if listed or isinstance(batch, (DataLoader, Dataset, Iterator)):
        given = f"a list of {len(batch)} tuples" if listed else type(batch).__name__
        raise ArgumentTypeError(
            f"batch is {given}; expected one batch, as a loader gives it: pass next(iter(loader)), or tuple(batch) for "
            "one whose parts are tuples"
        )
    return [batch]


def each(batch: Batch, f: Callable[[Any], Any]) -> Batch:
    """The batch with ``f`` of all its tensors, arrays and packed sequences, in the same containers."""
    if isinstance(batch, LEAVES):
        return f(batch)
    if isinstance(batch, Mapping):
        changed = {key: each(value, f) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return changed
        like = copy.copy(batch)
        for key, value in changed.items():
            like[key] = value
        return like
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(each(value, f) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)([each(value, f) for value in batch])
    if is_record(batch):
        other = copy.copy(batch)
        for entry in dataclasses.fields(batch):
            object.__setattr__(other, entry.name, each(getattr(batch, entry.name), f))
        return other
    return batch


def move(batch: Batch, device: torch.device) -> Batch:
    """A batch with its tensors detached and on ``device``: arrays become tensors, inference tensors ordinary ones."""

    def moved(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            x = _tensor(x)
        if not isinstance(x, Tensor):
            return x.to(device) if isinstance(x, PackedSequence) else x  # type: ignore[arg-type]
        if x.is_meta and device.type != "meta":
            raise LoaderError(f"a batch holds a tensor {tuple(x.shape)} on the meta device; expected one with numbers")
        if not (x.is_inference() or torch.is_inference_mode_enabled()):
            return x.detach().to(device)
        with torch.inference_mode(mode=False):
            return (x.clone() if x.is_inference() else x.detach()).to(device)

    return each(batch, moved)


def _tensor(x: np.ndarray) -> Any:
    """A copy as a tensor; arrays of texts and objects as they are."""
    if x.dtype.kind not in "biufc":
        return x
    try:
        return torch.tensor(x)
    except TypeError as error:
        raise LoaderError(
            f"a batch holds a NumPy array of dtype {x.dtype}, unknown to torch; pass x.astype('int64') or the like"
        ) from error


def leading_size(batch: Batch) -> int | None:
    """The first axis of the first tensor of a batch."""
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.ndim else None
    if isinstance(batch, np.ndarray):
        return len(batch) if batch.ndim else None
    return next((size for item in items(batch) if (size := leading_size(item)) is not None), None)


def items(batch: Batch) -> Iterable[Any]:
    """What a container of a batch holds; nothing of others."""
    if isinstance(batch, (tuple, list)):
        return batch
    if isinstance(batch, Mapping):
        return batch.values()
    if is_record(batch):
        return [getattr(batch, entry.name) for entry in dataclasses.fields(batch)]
    return ()


def tensors(batch: Batch) -> Iterator[Tensor]:
    """All tensors of a batch, however deep."""
    if isinstance(batch, PackedSequence):
        yield batch.data
    elif isinstance(batch, Tensor):
        yield batch
    else:
        for item in items(batch):
            yield from tensors(item)


def take(batch: Batch, index: slice | list[int], n: int) -> Batch:
    """The examples ``index`` of a batch, taken from every tensor with ``n`` rows."""
    return each(batch, lambda x: rows(x, index) if leading_size(x) == n else x)


def rows(x: Any, index: slice | list[int]) -> Any:
    """Rows of a tensor, also of a nested or sparse one, or sequences of a packed one."""
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        return pack_padded_sequence(padded[index], lengths[index], batch_first=True, enforce_sorted=False)
    if not isinstance(x, Tensor):
        return x[index]
    if x.layout is torch.strided and not x.is_nested:
        return x[index] if isinstance(index, slice) else x.index_select(0, torch.tensor(index, device=x.device))
    places = list(range(x.size(0)))[index] if isinstance(index, slice) else list(index)
    if x.is_nested:
        parts: Sequence[Tensor] = x.unbind()
        return torch.nested.as_nested_tensor([parts[j] for j in places], layout=x.layout)
    wanted, coordinates = torch.tensor(places, device=x.device), x.layout is torch.sparse_coo
    chosen = (x if coordinates else x.to_sparse_coo()).index_select(0, wanted)
    if coordinates:
        return chosen
    return chosen.to_sparse_csc() if x.layout is torch.sparse_csc else chosen.to_sparse_csr()


def with_input_gradients(batch: Batch) -> tuple[Batch, list[Tensor]]:
    """A batch whose floating-point inputs record gradients, and these inputs; raises :class:`ArgumentError` without
    any.
    """
    found: list[Tensor] = []

    def mark(x: Any) -> Any:
        if isinstance(x, Tensor):
            if not x.is_floating_point():
                return x
            with torch.inference_mode(mode=False):
                x = x.detach().clone() if x.is_inference() else x.detach()
                found.append(x.requires_grad_())
            return x
        if isinstance(x, Mapping):
            return {k: v if k == "labels" else mark(v) for k, v in x.items()}
        return type(x)(mark(v) for v in x) if isinstance(x, (tuple, list)) and not hasattr(x, "_fields") else x

    marked = (mark(batch[0]), *batch[1:]) if isinstance(batch, (tuple, list)) and batch else mark(batch)
    if not found:
        raise ArgumentError("the inputs hold no floating-point tensor to differentiate by (tokens? pass embeddings)")
    return marked, found
