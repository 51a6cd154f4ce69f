"""Random output signs instead of every output: one backward pass a sample, for models with very many outputs.

Signs ``e_k`` that are independent of each other make ``r = sum_k e_k J_k`` with ``E <r(x), r(y)> = sum_k <J_k(x),
J_k(y)>``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import UnsupportedError
from nngeom.core.stream import RUNNING, Numbers, Stream
from nngeom.fmat.dense import FMatDense
from nngeom.solve.hutchinson import Estimate
from nngeom.sweep.columns import Columns


@dataclass(frozen=True)
class RandomSigns:
    """Cotangents of random signs: fresh ones for every example, or the same for all (``shared``)."""

    samples: int
    seed: int
    shared: bool
    numbers: Numbers = RUNNING

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """One sign an output (and example), keyed by (seed, number of the example, sample)."""
        numbers = torch.zeros(1, dtype=torch.int64) if self.shared else self.numbers.of(batch, start, outputs.shape[0])

        def make(lo: int, hi: int) -> Tensor:
            signs = [Stream(self.seed, numbers, j, outputs.device).signs(*outputs.shape[1:]) for j in range(lo, hi)]
            return torch.stack(signs).to(outputs).expand(hi - lo, *outputs.shape)

        return Columns(self.samples, make)


class _Estimated:
    """What is known of a kernel only through random signs: a few numbers with their errors."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedError(
            f"a kernel estimated from random signs has no {name}; it has {self._offers()}, or build it without "
            "estimator="
        )

    def _offers(self) -> str:
        raise UnsupportedError("an estimate says what it offers")


@dataclass(frozen=True, eq=False)
class TraceEstimate(_Estimated):
    """``samples[j, n]``: unbiased draws of the summed squared norms of the gradients of each example."""

    samples: Tensor  # [samples n]

    def _offers(self) -> str:
        return "trace()"

    def trace(self) -> Estimate:
        """``tr K`` with its standard error (infinite for one sample); keeps its graph where there is one.

        Draws of different examples are independent, so their variances add.
        """
        s = self.samples.shape[0]
        error = (self.samples.detach().var(0).sum() / s).sqrt() if s > 1 else self.samples.new_tensor(torch.inf)
        return Estimate(self.samples.mean(0).sum(), error)


@dataclass(frozen=True, eq=False)
class KernelEstimate(_Estimated):
    """``sum_k K[k, n, k, m]``, the kernel summed over outputs, from draws that share their signs among examples.

    ``kernel``: an FMatDense ``(1, n, 1, m)``; ``standard_error``: of its entries, ``(n, m)``; ``traces``: of each draw.
    """

    kernel: FMatDense  # (1, n, 1, m)
    standard_error: Tensor  # [n m]
    traces: Tensor  # [samples], of each draw; empty where the kernel is rectangular

    def _offers(self) -> str:
        return "kernel, standard_error and trace()"

    def trace(self) -> Estimate:
        """``tr K`` with its standard error."""
        s = len(self.traces)
        error = self.traces.detach().std() / s**0.5 if s > 1 else self.standard_error.new_tensor(torch.inf)
        return Estimate(self.kernel.trace(), error)


def kernel_estimate(draws: Tensor) -> KernelEstimate:
    """Mean and standard error over draws ``[samples, n, m]``."""
    s, n, m = draws.shape
    error = draws.detach().std(0) / s**0.5 if s > 1 else torch.full_like(draws[0], torch.inf)
    traces = draws.diagonal(dim1=1, dim2=2).sum(-1) if n == m else draws.new_zeros(0)
    return KernelEstimate(FMatDense(draws.mean(0)[None, :, None]), error, traces)
