"""The Fisher information of a softmax, without its root and without cancellation."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core.output_metric import OutputMetric
from nngeom.cotangents.softmax import in_rows, others, wide


@dataclass(frozen=True, eq=False)
class SoftmaxMetric(OutputMetric):
    """``H[r] = scale[r] (diag p - p p^T)`` for rows of logits ``z``.

    Everything is written as a spread around the arg-max ``m``, ``sum_l p_l (x_l - x_m)^2 - (sum_l p_l (x_l - x_m))^2``,
    so that small numbers stay what they are where a model is confident.
    """

    z: Tensor  # [r c]
    scale: Tensor | None = None  # [r]

    @functools.cached_property
    def rest(self) -> Tensor:
        """``[r, c]``: ``p``, zero at the arg-max."""

        def some(part: slice) -> Tensor:
            p = wide(self.z[part]).softmax(-1)
            return p.scatter(-1, self.top[part].unsqueeze(-1), 0).to(self.z.dtype)

        return in_rows(self.z, some)

    @functools.cached_property
    def top(self) -> Tensor:
        """``[r]``: the arg-max."""
        return self.z.argmax(-1)

    @functools.cached_property
    def doubt(self) -> Tensor:
        """``[r, 1]``: the probability of all others."""
        return self.rest.sum(-1, keepdim=True)

    def diagonal(self) -> Tensor:
        return self._variances

    @functools.cached_property
    def _variances(self) -> Tensor:
        def some(part: slice) -> Tensor:
            p = wide(self.z[part]).softmax(-1)
            return (p * others(p)).to(self.z.dtype)

        return self._scaled(in_rows(self.z, some))

    def total(self) -> Tensor:
        p = self.rest + (1 - self.doubt) * torch.nn.functional.one_hot(self.top, self.z.shape[1])
        total = -p.T @ self._scaled(p)
        total.diagonal().copy_(self.diagonal().sum(0))
        return total

    def total_times(self, x: Tensor) -> Tensor:
        p = self.rest.scatter(-1, self.top.unsqueeze(-1), 1 - self.doubt).to(x.dtype)
        own = self.diagonal().sum(0).to(x.dtype) + self._scaled(p.square()).sum(0)
        return own.unsqueeze(-1) * x - p.T @ self._scaled(p @ x)

    def along(self, u: Tensor) -> Tensor:
        u = u.to(self.z.dtype)
        top, mean = u[self.top], self.rest @ u
        squares = self.rest @ u.square() - 2 * top * mean + self.doubt * top.square()
        return self._scaled((squares - (mean - self.doubt * top).square()).clamp_min(0))

    def spread(self, w: Tensor, part: slice) -> Tensor:
        rest, top, doubt = self.rest[part], self.top[part], self.doubt[part]
        shift = rest @ w - doubt * w[top]  # of the mean from the arg-max, [r i]
        weights = rest.scatter(1, top.unsqueeze(1), 1 - doubt)
        if self.scale is not None:
            weights = weights * self.scale[part].unsqueeze(1)
        x = w - (w[top] + shift).unsqueeze(1)
        x[torch.arange(len(top), device=x.device), top] = -shift
        return x.mul_(weights.sqrt().unsqueeze(-1))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale is None else x * self.scale.unsqueeze(1)
