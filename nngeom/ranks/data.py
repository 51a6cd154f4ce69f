"""Data that is split over processes in ways that change a result: warnings, where that can be told."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from nngeom.core.errors import RepeatedExamplesWarning, SameDataWarning


def warn_of_repeats(loader: Any) -> None:
    """Warn of a ``loader`` that repeats examples: torch's ``DistributedSampler``, accelerate's even batches."""
    sampler: Any = getattr(loader, "sampler", None)
    total, dataset = getattr(sampler, "total_size", None), getattr(sampler, "dataset", ())
    if total is not None and hasattr(dataset, "__len__") and total > len(dataset):
        warnings.warn(
            f"the loader's {type(sampler).__name__} repeats {total - len(dataset)} of {len(dataset)} examples so that "
            "all processes have as many, and these count twice; nng.shard(dataset) splits without repeats",
            RepeatedExamplesWarning,
            stacklevel=4,
        )
    batches = getattr(loader, "batch_sampler", None)
    if getattr(batches, "even_batches", False) and _uneven(batches):
        warnings.warn(
            "the loader was prepared with even_batches=True: its last batches are filled with examples from the start, "
            "which count twice; pass a DataLoader over nng.shard(dataset), not prepared",
            RepeatedExamplesWarning,
            stacklevel=4,
        )


def _uneven(batches: Any) -> bool:
    """Whether the batches of all do not come out even, as far as can be told."""
    inner = getattr(batches, "batch_sampler", None)
    sampler, size = getattr(inner, "sampler", None), getattr(inner, "batch_size", None)
    if sampler is None or size is None or not hasattr(sampler, "__len__"):
        return not getattr(batches, "drop_last", False)
    return not getattr(batches, "drop_last", False) and len(sampler) % (size * batches.num_processes) != 0


def warn_of_same(first: Sequence[tuple[str | None, int]]) -> None:
    """Warn where the first batches of all processes, ``(digest, examples)``, are the same."""
    digests = {digest for digest, _ in first}
    if len(first) > 1 and len(digests) == 1 and None not in digests and min(n for _, n in first) > 1:
        warnings.warn(
            f"all {len(first)} processes read the same first batch: each is to pass its own part of the data, "
            "nng.shard(dataset)",
            SameDataWarning,
            stacklevel=4,
        )
