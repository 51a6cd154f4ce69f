"""A metric of outputs, known without its square root: what is asked of it where a linear map makes the outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import linalg, memory


class OutputMetric(ABC):
    """Symmetric positive semi-definite matrices ``H[r]`` over ``c`` outputs, one for every row ``r``: an example, or a
    position of one.
    """

    @abstractmethod
    def diagonal(self) -> Tensor:
        """``[r, c]``: the diagonals."""

    @abstractmethod
    def total(self) -> Tensor:
        """``[c, c]``: ``sum_r H[r]``."""

    def total_times(self, x: Tensor) -> Tensor:
        """``[c, m]``: ``sum_r H[r] x`` for ``x [c, m]``."""
        return self.total().to(x.dtype) @ x

    @abstractmethod
    def along(self, u: Tensor) -> Tensor:
        """``[r, o]``: ``u_j^T H[r] u_j`` for the columns of ``u [c, o]``."""

    @abstractmethod
    def spread(self, w: Tensor, part: slice) -> Tensor:
        """``x [r, c, i]`` with ``x[r]^T x[r] = w^T H[r] w`` for ``w [c, i]``, of a ``part`` of the rows."""

    def behind(self, w: Tensor, rows: range) -> Tensor:
        """``l [r, i, i]``, lower triangular, with ``l l^T = w^T H w`` for ``w [c, i]``, of some ``rows``.

        Products are factorised by Cholesky; where that fails, as for singular ones, what they are made of by QR. In
        memory the columns come one after the other, as they are pulled back.
        """
        like = torch.promote_types(w.dtype, self.diagonal().dtype)
        root = torch.empty(len(rows), w.shape[1], w.shape[1], dtype=like, device=w.device).mT
        failed = []
        for lo, hi in memory.pieces(len(rows), w.numel() * w.element_size(), most=memory.CACHE_BYTES):
            x = self.spread(w, _slice(rows[lo:hi]))
            root[lo:hi], info = torch.linalg.cholesky_ex(_lower(x))
            failed.append(info)
        for r in torch.cat(failed).nonzero().flatten().tolist():  # a device is waited for once
            triangle = torch.linalg.qr(self.spread(w, _slice(rows[r : r + 1]))[0], mode="r")[1].T  # [i min(c i)]
            root[r] = 0
            root[r, :, : triangle.shape[1]] = triangle
        return root


@dataclass(frozen=True, eq=False)
class DiagonalMetric(OutputMetric):
    """Outputs that count by themselves: ``H = diag(d)``."""

    d: Tensor  # [r c]

    def diagonal(self) -> Tensor:
        return self.d

    def total(self) -> Tensor:
        return self.d.sum(0).diag_embed()

    def total_times(self, x: Tensor) -> Tensor:
        return self.d.sum(0).to(x.dtype).unsqueeze(-1) * x

    def along(self, u: Tensor) -> Tensor:
        return self.d @ u.square()

    def spread(self, w: Tensor, part: slice) -> Tensor:
        return self.d[part].sqrt().unsqueeze(-1) * w


@dataclass(frozen=True, eq=False)
class PartMetric(OutputMetric):
    """That of the outputs ``lo`` to ``hi`` alone: a principal block of every matrix of another ``metric``."""

    metric: OutputMetric
    lo: int
    hi: int

    def diagonal(self) -> Tensor:
        return self.metric.diagonal()[:, self.lo : self.hi]

    def total(self) -> Tensor:
        like = self.metric.diagonal()
        return self.total_times(torch.eye(self.hi - self.lo, dtype=like.dtype, device=like.device))

    def total_times(self, x: Tensor) -> Tensor:
        return torch.cat([self.metric.total_times(u)[self.lo : self.hi] for u in self._among_all(x)], 1)

    def along(self, u: Tensor) -> Tensor:
        return torch.cat([self.metric.along(x) for x in self._among_all(u)], 1)

    def spread(self, w: Tensor, part: slice) -> Tensor:
        return self.metric.spread(torch.cat(list(self._among_all(w)), 1), part)

    def _among_all(self, x: Tensor) -> Iterator[Tensor]:
        """``x [hi - lo, m]`` with zeros for all other outputs, ``[c, m]``, some columns at a time."""
        c = self.metric.diagonal().shape[1]
        for first, last in memory.pieces(x.shape[1], c * x.element_size(), most=memory.CACHE_BYTES):
            whole = x.new_zeros(c, last - first)
            whole[self.lo : self.hi] = x[:, first:last]
            yield whole


def _lower(x: Tensor) -> Tensor:
    """The lower halves of ``x[r]^T x[r]``, and some of the upper ones."""
    w = x.shape[-1]
    out = x.new_empty(len(x), w, w)
    for lo, hi in linalg.strips(w):
        out[:, lo:, lo:hi] = x[..., lo:].mT @ x[..., lo:hi]
    return out


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop, rows.step)
