"""Stochastic Lanczos quadrature: the spectral density and the log-determinant of a symmetric operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg, memory
from nngeom.core.damping import Tikhonov, as_damping
from nngeom.core.errors import ArgumentError, NonFiniteError, SingularError
from nngeom.solve.hutchinson import Estimate, mean_estimate, rademacher, require_samples


@dataclass(frozen=True)
class SpectralDensity:
    """``nodes`` and ``weights`` (summing to one), ``(r,)`` each, that stand for the distribution of eigenvalues."""

    nodes: Tensor
    weights: Tensor

    def on(self, grid: Tensor, width: float) -> Tensor:
        """The density on a ``grid`` of any shape, each node smoothed by a Gaussian of standard deviation ``width``."""
        z = (grid.unsqueeze(-1) - self.nodes) / width
        result: Tensor = (self.weights * torch.exp(-0.5 * z.square())).sum(-1) / (width * (2 * torch.pi) ** 0.5)
        return result

    def expectation(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of ``f`` over eigenvalues: ``tr f(M) / d``."""
        return (self.weights * f(self.nodes)).sum()


def spectral_density(
    matrix: Callable[[Tensor], Tensor],
    d: int,
    like: Tensor,
    steps: int = 64,
    samples: int = 8,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Gauss quadrature nodes from ``samples`` random starts of ``steps`` Lanczos steps (Ghorbani et al. 2019)."""
    nodes, weights = quadrature(tridiagonal(matrix, d, like, steps, samples, generator))
    return SpectralDensity(nodes.flatten().to(like), (weights / samples).flatten().to(like))


def slq_logdet(
    matrix: Callable[[Tensor], Tensor],
    d: int,
    like: Tensor,
    damping: float,
    steps: int = 64,
    samples: int = 32,
    generator: torch.Generator | None = None,
) -> Estimate:
    """``log det(M + damping I)``: ``d`` times the mean of ``log`` over the quadrature (Ubaru, Chen and Saad 2017).

    The standard error is that of the mean over ``samples`` signs, and beside it what the second half of the ``steps``
    changed. Raises :class:`SingularError` where the damped matrix shows an eigenvalue that is not positive.
    """
    t = tridiagonal(matrix, d, like, steps, samples, generator)
    fewer = -(-t.shape[-1] // 2)
    whole, shorter = (d * _mean_log(t[:, :m, :m], damping, like) for m in (t.shape[-1], fewer))
    estimate = mean_estimate(whole)
    error = torch.hypot(estimate.standard_error, (whole - shorter).mean().abs())
    return Estimate(estimate.value.to(like), error.to(like))


def require_slq(estimator: str, damping: Any) -> float:
    """The number that is added before the logarithm; raises for another estimator, and what is no plain number."""
    if estimator != "slq":
        raise ArgumentError(f"estimator is {estimator!r}; expected 'slq'")
    d = as_damping(damping)
    if not isinstance(d, Tikhonov) or isinstance(d.value, Tensor):
        raise ArgumentError(f"an estimated logdet takes a number as damping, without gradient, got {damping!r}")
    return d.value


def _mean_log(t: Tensor, damping: float, like: Tensor) -> Tensor:
    """The mean of ``log(eigenvalue + damping)`` for each start."""
    nodes, weights = quadrature(t)
    counted = weights > torch.finfo(like.dtype).eps ** 2
    least = float(torch.where(counted, nodes, torch.inf).min()) + damping
    if least <= torch.finfo(like.dtype).eps * float(nodes.abs().max()):
        raise SingularError(
            f"the matrix with damping {damping:g} shows the eigenvalue {least:.2e}: it is singular or indefinite to "
            "rounding; use a larger damping"
        )
    return torch.where(counted, weights * (nodes + damping).clamp_min(least).log(), 0.0).sum(-1)


def quadrature(t: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights ``[samples, steps]`` of tridiagonal matrices ``t [samples, steps, steps]``."""
    values, vectors = linalg.eigh(t)
    return values, vectors[..., 0, :].square()


@torch.no_grad()
def tridiagonal(
    matrix: Callable[[Tensor], Tensor],
    d: int,
    like: Tensor,
    steps: int,
    samples: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``[samples, m, m]``, float64, ``m = min(steps, d)``: what Lanczos steps from random signs make of ``matrix``.

    The products of all samples that the memory budget has room for are one.
    """
    require_samples(samples)
    if steps < 1:
        raise ArgumentError(f"steps is {steps}; expected at least 1")
    starts, m = rademacher(samples, d, like=like, generator=generator), min(steps, d)
    pieces = memory.pieces(samples, (m + 4) * d * like.element_size())
    return torch.cat([_tridiagonal(matrix, starts[lo:hi] / d**0.5, m) for lo, hi in pieces])


def _tridiagonal(matrix: Callable[[Tensor], Tensor], start: Tensor, m: int) -> Tensor:
    *_, t = growing(matrix, start, m)
    return t


def growing(matrix: Callable[[Tensor], Tensor], start: Tensor, m: int) -> Iterator[Tensor]:
    """``[samples, j, j]``, float64, after every step ``j`` up to ``m``, of Lanczos from unit vectors ``start [samples,
    d]``.

    Where a Krylov space is exhausted its matrix goes on with zeros, which the first vector has no part in.
    """
    samples, d = start.shape
    q = start.new_zeros(samples, m, d)
    t = torch.zeros(samples, m, m, dtype=torch.float64)
    w, largest = start, start.new_zeros(samples)
    for j in range(m):
        q[:, j] = w
        w = matrix(w)
        if not bool(torch.isfinite(w).all()):
            raise NonFiniteError("a product of Lanczos steps is not finite; check the inputs and the parameters")
        alpha = (w * q[:, j]).sum(-1)
        t[:, j, j] = alpha.cpu().double()
        yield t[:, : j + 1, : j + 1]
        if j + 1 == m:
            return
        basis = q[:, : j + 1]
        for _ in range(2):  # twice is enough
            w = w - ((basis @ w.unsqueeze(-1)).mT @ basis).squeeze(1)
        beta = w.norm(dim=-1)
        largest = torch.maximum(largest, torch.maximum(alpha.abs(), beta))
        going = beta > 10 * torch.finfo(w.dtype).eps * largest
        beta = torch.where(going, beta, 0.0)
        w = torch.where(going.unsqueeze(-1), w / beta.clamp_min(torch.finfo(w.dtype).tiny).unsqueeze(-1), 0.0)
        t[:, j, j + 1] = t[:, j + 1, j] = beta.cpu().double()
