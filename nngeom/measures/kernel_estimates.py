"""Kernels from random signs of the outputs instead of all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nngeom.core.errors import ArgumentError
from nngeom.core.stream import seed_of
from nngeom.fmat.dense import FMatBlockDiag, FMatDense
from nngeom.fmat.diag import FMatDiag
from nngeom.fmat.estimate import KernelEstimate, RandomSigns, TraceEstimate, kernel_estimate
from nngeom.fmat.kernels import kernels
from nngeom.fmat.products import EVERYTHING
from nngeom.fmat.side import Side
from nngeom.measures.probed import require_samples
from nngeom.sweep.agreement import numbered


def signs(kind: Any, estimator: str, samples: int, generator: torch.Generator | None, *, plain: bool) -> RandomSigns:
    """Random signs of the outputs; ``plain``: nothing else is asked for that does not go with them."""
    if estimator != "rademacher":
        raise ArgumentError(f"estimator is {estimator!r}; expected 'rademacher', or None for all outputs")
    if kind not in (FMatDiag, FMatDense) or not plain:
        raise ArgumentError(
            "estimator='rademacher' goes with FMatDiag (the trace) or FMatDense (the kernel summed over "
            "outputs), without centered= or out="
        )
    return RandomSigns(require_samples(samples), seed_of(generator), shared=kind is FMatDense)


def estimated(kind: Any, rows: Side, columns: Side | None, *, progress: bool) -> TraceEstimate | KernelEstimate:
    """The trace, or the kernel summed over outputs; over several processes draws are those of one."""
    rows = replace(rows, sweep=numbered(rows.sweep))
    if kind is FMatDiag:
        return TraceEstimate(kernels(FMatDiag, rows, None, EVERYTHING)[""].tensor)
    if columns is not None:
        columns = replace(columns, sweep=replace(columns.sweep, cotangents=rows.sweep.cotangents))
    return kernel_estimate(kernels(FMatBlockDiag, rows, columns, EVERYTHING, progress=progress)[""].tensor)
