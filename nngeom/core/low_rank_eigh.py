"""Eigendecompositions of sums over few examples: the range by a pivoted Cholesky factorisation, the rest is zero."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core import lapack

ROUNDINGS = 16  # of the largest eigenvalue, below which one of a sum over examples counts as zero
LARGE = 256  # a side below which nothing is gained
SHARE = (
    3  # above one in so many nothing is gained: 0.4 of the time at 0.22 of 1153, 0.7 at 0.38 of 785, 1 at 0.44 of 577
)
PIVOT = 0.25  # of a rounding of the largest eigenvalue: pivots of sums over few examples fall from 10 to 0.1 at once
STEPS = 8  # of a power iteration for the size of the largest eigenvalue


def low_rank_eigh(m: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues, ascending, and eigenvectors of ``m [1, p, p]``, positive semi-definite to rounding, with zeros for
    those below :data:`ROUNDINGS` of the largest; ``None`` where more than ``p / 3`` seem to be above rounding, or it is
    not known to be faster (float64, small, on a device).

    ``m = L L^T`` up to rounding, ``L [p, r]``, ``q`` an orthonormal basis of which the first ``r`` span ``m L``: the
    eigenvectors of ``q1^T m q1``, in float64, and the others. What is left out, ``m - m q1 q1^T``, has a Frobenius
    norm below :data:`ROUNDINGS` of the largest eigenvalue, which is seen: so has each eigenvalue that is left out, and
    none is off by more.
    """
    p = m.shape[-1]
    if len(m) > 1 or p < LARGE or m.dtype != torch.float32 or m.device.type != "cpu" or m.requires_grad:
        return None
    x = m[0].double()
    rounding = torch.finfo(m.dtype).eps
    root = _root(x, PIVOT * rounding * _largest(x))
    if root is None:
        return None
    r = root.shape[1]
    q, _ = torch.linalg.qr(x @ root, mode="complete")
    range_ = q[:, :r]
    mapped = x @ range_
    values, turn = lapack.eigh(range_.T @ mapped)
    left_out = float(x.addmm_(mapped, range_.T, alpha=-1).norm())
    zero = ROUNDINGS * rounding * float(values[-1])
    if float(values[0]) < -zero or left_out > zero:
        return None
    values = values * (values > zero)
    vectors = torch.cat([q[:, r:], range_ @ turn], 1)
    return torch.cat([values.new_zeros(p - r), values]).to(m).unsqueeze(0), vectors.to(m).unsqueeze(0)


def _largest(x: Tensor) -> float:
    """The largest eigenvalue of ``x [p, p]`` or a number below it."""
    v = x.diagonal().clone()
    for _ in range(STEPS):
        v = x @ (v / v.norm())
    return float(v.norm())


def _root(x: Tensor, least: float) -> Tensor | None:
    """``L [p, r]`` with ``L L^T = x`` but for pivots below ``least``; ``None`` for too many pivots."""
    from scipy.linalg.lapack import dpstrf

    most = len(x) // SHARE
    largest = x.diagonal().topk(most + 1)
    if not 0 < least < float(largest.values[0]):
        return None
    part = x[largest.indices][:, largest.indices]
    pivots, failed = torch.linalg.cholesky_ex(part)
    if not failed and float(pivots.diagonal().amin()) ** 2 > least:  # of more than the most
        return None
    with lapack.threads(torch.get_num_threads()):
        factor, order, r, _ = dpstrf(x.numpy(), tol=least, lower=1)
    if r > most:
        return None
    root = torch.empty(len(x), r, dtype=x.dtype)
    root[torch.from_numpy(order).long() - 1] = torch.from_numpy(factor[:, :r]).tril()
    return root
