"""NumPy's and SciPy's LAPACK where it is faster than torch's and can be held to torch's threads, by the package
threadpoolctl.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# A side from which, on one thread, divide and conquer of OpenBLAS takes less time than torch's: 0.83 of it at 256 and
# 301, 0.76 at 577, 0.66 to 0.71 at 785, 0.66 to 0.74 at 1000 and 1153; 1.0 at 200 (AMD EPYC, torch 2.13 with MKL,
# OpenBLAS 0.3.30 and 0.3.31, processor seconds, November 2026). On two threads it takes 0.39 to 0.88 of that by itself,
# but EKFAC of four nets 1.1 to 1.7 of what it takes with torch's, whose threads wait for work on the same cores: there
# several matrices are decomposed beside each other, on one thread each (nngeom.core.beside).
SIDE = 256
ROWS = 64  # at 64 rows half of their products take 0.8 to 1.1 of the time of all, 0.6 at 270, 0.5 at 1000 (one thread)


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """As ``torch.linalg.eigh`` of float64 ``x [..., p, p]``, and by it where NumPy's is not known to be faster; raises
    :class:`RuntimeError` where divide and conquer does not converge.
    """
    p = x.shape[-1]
    if p < SIDE or x.requires_grad or x.device.type != "cpu" or torch.get_num_threads() > 1 or not _libraries():
        values, vectors = torch.linalg.eigh(x)
        return values, vectors
    import numpy as np

    try:
        with threads(1):
            values, vectors = np.linalg.eigh(x.numpy())  # which lets other threads run meanwhile, unlike SciPy's
    except np.linalg.LinAlgError as error:
        raise RuntimeError(f"an eigendecomposition of side {p} did not converge ({error})") from error
    return torch.from_numpy(values), torch.from_numpy(vectors)


def half_gram(r: Tensor, columns: Iterable[Tensor]) -> Tensor:
    """``x x^T``, right in its upper half, of ``columns [m, q]`` of ``x``, some at a time, as many as rows of ``r``; no
    other half is computed where SciPy's BLAS is at hand on one thread. Without a graph.
    """
    m = len(r)
    total = r.new_zeros(m, m)
    simple = m < ROWS or r.device.type != "cpu" or torch.get_num_threads() > 1 or not _libraries()
    if simple or r.dtype not in (torch.float32, torch.float64):
        for x in columns:
            total.addmm_(x, x.T)
        return total
    from scipy.linalg import blas

    product = blas.dsyrk if r.dtype == torch.float64 else blas.ssyrk
    half = total.numpy().T
    with threads(1):
        for x in columns:
            across = x.T.is_contiguous()  # in the order of BLAS, x itself; else its transpose
            given = (x if across else x.T).numpy()
            # the lower half in that order takes 0.87 to 0.93 of the time of the upper one (100 to 600 rows)
            half = product(1.0, given, trans=0 if across else 1, beta=1.0, c=half, lower=1, overwrite_c=1)
    return torch.from_numpy(half.T)


def threads(most: int) -> Any:
    """A context in which the libraries of NumPy and SciPy take so many threads: by themselves they take all cores,
    whatever torch's setting, and wait for them where others are at work. Without threadpoolctl it changes nothing.
    """
    found = _libraries()
    return found.limit(limits=most) if found else contextlib.nullcontext()


@functools.cache
def _libraries() -> Any:
    """What sets their threads; ``None`` where nothing does."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    import scipy.linalg  # noqa: F401 - loads them

    found = ThreadpoolController().select(user_api="blas")
    return found if found.info() and all(x["internal_api"] == "openblas" for x in found.info()) else None
