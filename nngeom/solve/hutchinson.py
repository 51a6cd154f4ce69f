"""Stochastic estimates of traces and diagonals from products with random vectors, and what an estimate is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError


@dataclass(frozen=True)
class Estimate:
    """A ``value``, a number, tensor or vector, with its ``standard_error``, of the same shape."""

    value: Any
    standard_error: Any

    def __float__(self) -> float:
        return float(self.value)


def rademacher(*shape: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent random signs, in the dtype and on the device of ``like``."""
    device = generator.device if generator is not None else like.device
    return (2 * torch.randint(0, 2, shape, generator=generator, device=device) - 1).to(like)


def hutchinson(
    matrix: Callable[[Tensor], Tensor], d: int, samples: int, like: Tensor, generator: torch.Generator | None = None
) -> Estimate:
    """``tr M`` as the mean of ``z^T M z`` over random signs ``z`` (Hutchinson 1989)."""
    require_samples(samples)
    z = rademacher(samples, d, like=like, generator=generator)
    return mean_estimate((z * matrix(z)).sum(-1))


def hutchinson_diagonal(
    matrix: Callable[[Tensor], Tensor], d: int, samples: int, like: Tensor, generator: torch.Generator | None = None
) -> Estimate:
    """The diagonal ``[d]`` as the mean of ``z * M z`` over random signs ``z`` (Bekas et al. 2007)."""
    require_samples(samples)
    z = rademacher(samples, d, like=like, generator=generator)
    return mean_estimate(z * matrix(z))


def hutchpp(
    matrix: Callable[[Tensor], Tensor], d: int, samples: int, like: Tensor, generator: torch.Generator | None = None
) -> Estimate:
    """``tr M`` by Hutch++ (Meyer et al. 2021): exact on a sketched range, Hutchinson on the rest; ``samples``
    products.
    """
    require_samples(samples)
    third = max(1, min(samples // 3, d))
    sketch = rademacher(third, d, like=like, generator=generator)
    q, _ = torch.linalg.qr(matrix(sketch).T)
    exact = (q.T * matrix(q.T.contiguous())).sum()
    g = rademacher(max(1, samples - 2 * third), d, like=like, generator=generator)
    g = g - (g @ q) @ q.T
    rest = mean_estimate((g * matrix(g)).sum(-1))
    return Estimate(exact + rest.value, rest.standard_error)


def mean_estimate(x: Tensor) -> Estimate:
    """The mean over draws ``x [samples, ...]`` with its standard error, infinite for a single draw."""
    error = x.std(0) / len(x) ** 0.5 if len(x) > 1 else torch.full_like(x[0], float("inf"))
    return Estimate(x.mean(0), error)


def require_samples(samples: int, least: int = 1) -> None:
    """Raise :class:`ArgumentError` where ``samples`` are fewer than ``least``."""
    if samples < least:
        raise ArgumentError(f"samples is {samples}; expected at least {least}")
