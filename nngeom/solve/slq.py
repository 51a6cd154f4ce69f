"""Stochastic Lanczos quadrature: the spectral density of a symmetric operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.solve.hutchinson import rademacher
from nngeom.solve.lanczos import tridiagonalize


@dataclass(frozen=True)
class SpectralDensity:
    """``nodes`` and ``weights`` (summing to one), ``(r,)`` each, that stand for the distribution of eigenvalues."""

    nodes: Tensor
    weights: Tensor

    def on(self, grid: Tensor, width: float) -> Tensor:
        """The density on a ``grid`` of any shape, each node smoothed by a Gaussian of standard deviation ``width``."""
        z = (grid.unsqueeze(-1) - self.nodes) / width
        return (self.weights * torch.exp(-0.5 * z.square())).sum(-1) / (width * (2 * torch.pi) ** 0.5)

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
    nodes, weights = [], []
    for _ in range(samples):
        t, _ = tridiagonalize(matrix, rademacher(d, like=like, generator=generator), min(steps, d))
        values, vectors = torch.linalg.eigh(t)
        nodes.append(values)
        weights.append(vectors[0].square() / samples)
    return SpectralDensity(torch.cat(nodes), torch.cat(weights))
