"""Which iterables are loaders, and the batches that they give: those that are kept have memory of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, default_collate

from nngeom.capture.batch import LEAVES, Batch, each, is_record, leading_size
from nngeom.core.errors import ArgumentError, ArgumentTypeError

_OFFER = (
    "a list is an iterable of batches: for one batch pass tuple(batch) or [batch]; for several batches of inputs alone "
    "pass [(x1,), (x2,)], or an iterator over them"
)


def as_batches(loader: Any) -> Iterable[Batch]:
    """An iterable of batches; a tuple, a tensor, an array or a mapping given as loader is one batch.

    Those that are made while they are asked for are copies, for the next may be written into the same memory.
    Raises :class:`ArgumentError` for a list that looks like one batch, as ``next(iter(DataLoader))`` gives it, and
    :class:`ArgumentTypeError` for what is no iterable of batches.
    """
    if isinstance(loader, (tuple, Mapping, *LEAVES)) or (is_record(loader) and not hasattr(loader, "__iter__")):
        return [_bare(loader)]
    if isinstance(loader, (str, bytes)) or not hasattr(loader, "__iter__") or hasattr(loader, "__array__"):
        raise ArgumentTypeError(
            f"loader is {type(loader).__name__}; expected a DataLoader, an iterable of batches, or one batch "
            "(a tuple, tensor, array or dict)"
        )
    if isinstance(loader, list):
        _require_batches(loader)
        return [_bare(batch) for batch in loader]
    return map(_copied, loader) if isinstance(loader, Iterator) else _Loader(loader)


class _Loader:
    """A loader that can be iterated again; ``len`` where it has one."""

    def __init__(self, source: Iterable[Any]) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Batch]:
        return map(_bare if _makes_memory(self.source) else _copied, self.source)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]


def _makes_memory(loader: Iterable[Any]) -> bool:
    """Whether every batch is known to have memory of its own: stacked, or from another process."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return False
    return loader.collate_fn is default_collate or loader.num_workers > 0


def _copied(batch: Batch) -> Batch:
    """With memory of its own; what was computed from parameters, or is one, stays for what refuses it."""

    def copied(x: Any) -> Any:
        if isinstance(x, PackedSequence):
            return x.to(x.data.device, copy=True)  # type: ignore[arg-type]
        if isinstance(x, np.ndarray):
            return x.copy()
        return x if x.requires_grad or isinstance(x, Parameter) else x.clone()

    return _bare(each(batch, copied))


def _bare(batch: Batch) -> Batch:
    return (batch,) if isinstance(batch, LEAVES) and not isinstance(batch, PackedSequence) else batch


def _require_batches(items: list[Any]) -> None:
    """Raise for a list of tensors that is more likely one batch than several: see :func:`as_batches`."""
    arrays = [x for x in items if isinstance(x, (Tensor, np.ndarray))]
    if len(items) < 2 or not arrays:
        return
    given = ", ".join(f"{type(x).__name__} {tuple(x.shape) if hasattr(x, 'shape') else ''}".strip() for x in items[:4])
    given += ", ..." if len(items) > 4 else ""
    if len(arrays) < len(items):
        raise ArgumentError(f"loader is a list of unlike things, [{given}]; {_OFFER}")
    sizes = {leading_size(x) for x in arrays}
    if len(sizes) == 1 and None not in sizes and (len(items) < 4 or len({(x.dtype, x.ndim) for x in arrays}) > 1):
        raise ArgumentError(
            f"loader is a list of {len(items)} tensors with {sizes.pop()} rows each, [{given}], which is how a "
            f"DataLoader gives one batch; {_OFFER}"
        )
