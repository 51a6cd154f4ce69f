"""Independent pieces of work on a CPU beside each other, each on one of torch's threads instead of all."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from nngeom.core import lapack

K = TypeVar("K", bound=Hashable)
LEAST = 128**3  # the cost of a decomposition of side 128, below which a piece is no work for a thread of its own


def beside(make: Callable[[K], Any], costs: Mapping[K, float], device: torch.device) -> dict[K, Any]:
    """``make(key)`` for every key of ``costs``, which are about the cubes of sides that LAPACK decomposes.

    Where two and more are large, on a CPU with several threads of torch's, as many at once as it has threads, and cores
    to run on, the most expensive first: each gives the bits that it gives on one thread. Raises what the first of the
    keys raises.
    """
    threads = min(torch.get_num_threads(), _cores(), sum(cost >= LEAST for cost in costs.values()))
    own = torch.backends.openmp.is_available()  # a setting of each thread's, else of the process
    if threads < 2 or device.type != "cpu" or not own:
        return {key: make(key) for key in costs}
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def one(key: K) -> Any:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return make(key)

    before = torch.get_num_threads()
    try:
        with lapack.threads(1), ThreadPoolExecutor(threads, "nngeom", torch.set_num_threads, (1,)) as pool:
            found = {key: pool.submit(one, key) for key in sorted(costs, key=lambda key: -costs[key])}
            return {key: found[key].result() for key in costs}
    finally:
        torch.set_num_threads(before)  # of threads that are yet to come: each has its own setting


def _cores() -> int:
    """How many this thread may run on, which new ones inherit: a single one where OpenMP was told to bind its own."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
