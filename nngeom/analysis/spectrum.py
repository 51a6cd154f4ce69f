"""What the eigenvalues of a kernel or a metric say: effective rank, trace ratios, a summary."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.analysis.kernel import require_symmetric
from nngeom.core import linalg
from nngeom.core.errors import ArgumentError, NonFiniteError

THRESHOLD = 1e-12  # eigenvalues below this share of the largest count as zero


def spectrum(K: Any) -> Tensor:
    """Eigenvalues, descending, those at rounding level or below set to zero.

    ``K``: an FMat, a PMat, a kernel ``(c, n, c, n)`` or ``(n, n)``, or eigenvalues ``(r,)`` in any order.
    Raises :class:`NonFiniteError` on NaN or infinity.
    """
    if isinstance(K, Tensor) and K.ndim == 1:
        values = K
    elif isinstance(K, Tensor):
        values = linalg.eigh(require_symmetric(K))[0]
    elif hasattr(K, "eigh"):
        values = K.eigh()[0]
    else:
        raise ArgumentError(
            f"got {type(K).__name__}; expected an FMat, a PMat, a kernel tensor or a tensor of eigenvalues"
        )
    if values.is_complex():
        raise ArgumentError(f"eigenvalues are {values.dtype}; expected real numbers")
    values = values.flatten() if values.is_floating_point() else values.flatten().to(torch.get_default_dtype())
    if values.numel() == 0:
        raise ArgumentError("there are no eigenvalues; expected at least one")
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("eigenvalues contain NaN or infinity; check the inputs and the model")
    floor = max(THRESHOLD, values.numel() * torch.finfo(values.dtype).eps) * values.abs().max()
    return torch.where(values > floor, values, torch.zeros_like(values)).sort(descending=True).values


def effective_rank(K: Any) -> Tensor:
    """``exp(-sum_j mu_j log mu_j)`` with ``mu_j = lambda_j / sum lambda`` over the positive eigenvalues.

    Between 1 and the rank, invariant to scaling; 0 for a kernel that is zero. ``K`` as in :func:`spectrum`.
    Source: Roy and Vetterli 2007; Baratin et al. 2021, eq. 5.
    """
    values = spectrum(K)
    total = values.sum()
    if bool(total <= 0):
        return torch.zeros_like(total)
    return torch.special.entr(values / total).sum().exp()


def trace_ratios(K: Any, ks: int | Iterable[int]) -> Tensor:
    """The share of the trace in the ``k`` largest eigenvalues, one number for each of ``ks`` (a scalar for one ``k``).

    ``K`` as in :func:`spectrum`. ``k`` beyond the number of eigenvalues gives 1; a zero kernel NaN. Source: Baratin et
    al. 2021, eq. 6, with ``j <= k``.
    """
    values = spectrum(K)
    asked = [ks] if isinstance(ks, int) else list(ks) if isinstance(ks, Iterable) else [-1]
    if not all(isinstance(k, numbers.Real) and k == k // 1 and k >= 0 for k in asked):
        raise ArgumentError(f"ks is {ks}; expected whole numbers of at least 0")
    index = torch.as_tensor(asked, dtype=torch.long, device=values.device)
    cumulative = torch.cat([values.new_zeros(1), values.cumsum(0)])
    ratios = cumulative[index.clamp_max(len(values))] / cumulative[-1]
    return ratios[0] if isinstance(ks, int) else ratios


@dataclass(frozen=True)
class SpectrumSummary:
    """Numbers a spectrum is followed by: all of one kernel, none divided by ``n``.

    ``trace``, ``largest``, ``mean`` and ``median``: of the eigenvalues; ``rank``: how many are positive;
    ``effective_rank``: the exponential of their entropy; ``participation``: ``1 / sum mu^2`` of their shares ``mu`` of
    the trace, at most the effective rank.
    """

    trace: Tensor
    largest: Tensor
    mean: Tensor
    median: Tensor
    rank: int
    effective_rank: Tensor
    participation: Tensor


def spectrum_summary(K: Any) -> SpectrumSummary:
    """Trace, largest, mean and median eigenvalue, rank and effective ranks. ``K`` as in :func:`spectrum`."""
    values = spectrum(K)
    total = values.sum()
    participation = total.square() / values.square().sum() if bool(total > 0) else torch.zeros_like(total)
    return SpectrumSummary(
        trace=total,
        largest=values[0],
        mean=values.mean(),
        median=values.median(),
        rank=int((values > 0).sum()),
        effective_rank=effective_rank(values),
        participation=participation,
    )
