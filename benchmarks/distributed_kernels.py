"""What :mod:`benchmarks.distributed` measures of kernels, influence and files: each process on its own part."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

import nngeom as nng

Batches = list[tuple[Tensor, Tensor]]


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder that all processes see, for a while."""
    made: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    try:
        yield Path(made[0])
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(made[0], ignore_errors=True)


def kernel_jobs(net: nn.Module, batches: Batches, folder: Path) -> dict[str, Callable[[], Any]]:
    """Kernels of the losses of half of the examples, whole, in parts, and in a file, scores of all of them for
    one batch of queries, and a matrix whose sums are kept.
    """
    group, numbers = dist.group.WORLD, itertools.count()
    half = batches[: max(1, len(batches) // 2)]
    queries = half[:1] if dist.get_rank() == 0 else []
    fisher = nng.FIM(net, batches, nng.PMatKFAC, process_group=group)
    options: dict[str, Any] = {"loss": "cross_entropy", "process_group": group}
    kernel = lambda **o: nng.GramMatrix(net, half, **options, **o)
    return {
        "a kernel, whole": kernel,
        "a kernel, sharded=True": lambda: kernel(sharded=True),
        "a kernel, out=": lambda: kernel(out=folder / f"{next(numbers)}.npy"),
        "influence, the ten largest": lambda: nng.influence(
            net, batches, queries, fisher, damping=1e-2, top=10, **options
        ),
        "FIM, PMatKFAC, checkpoint=": lambda: nng.FIM(
            net, batches, nng.PMatKFAC, process_group=group, checkpoint=folder / f"{next(numbers)}"
        ),
    }
