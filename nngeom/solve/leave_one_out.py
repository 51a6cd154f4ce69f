"""XTrace and XDiag: every random vector serves as a part of a low-rank approximation, and as a test of the others'.

Letters: ``d`` side, ``k`` test vectors (rows), ``Q R`` the products of all with the matrix ``A``. Without vector ``i``
the range is that of ``Q`` less the direction ``s_i``, a column of ``R^-T``, normalised. Source: Epperly, Tropp and
Webber 2024, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError
from nngeom.solve.hutchinson import (
    Estimate,
    hutchinson,
    hutchinson_diagonal,
    hutchpp,
    mean_estimate,
    rademacher,
    require_samples,
)

Matrix = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sketch:
    """``test``, ``q`` and ``aq``, the rows ``[k, d]`` of test vectors, of ``Q`` and of ``A Q``; ``r [k, k]``; and ``s
    [k, k]``, whose column ``i`` is the direction of ``Q`` that vector ``i`` alone has seen.
    """

    test: Tensor
    q: Tensor
    aq: Tensor
    r: Tensor
    s: Tensor

    @staticmethod
    def of(matrix: Matrix, test: Tensor) -> Sketch:
        """By ``2 k`` products."""
        q, r = torch.linalg.qr(matrix(test).T)
        q = q.T.contiguous()
        pivots = r.diagonal().abs()
        tiny = torch.finfo(r.dtype).tiny + torch.finfo(r.dtype).eps * pivots.max()  # of directions that are rounding
        solid = r + torch.diag(torch.where(pivots < tiny, tiny, torch.zeros_like(tiny)))
        inverse = torch.linalg.solve_triangular(solid, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True)
        return Sketch(test, q, matrix(q), r, torch.nn.functional.normalize(inverse.T, dim=0))


def xtrace(matrix: Matrix, d: int, samples: int, like: Tensor, generator: torch.Generator | None = None) -> Estimate:
    """``tr A`` by XTrace, exact where the rank is below ``samples / 2``; the standard error is that of its terms."""
    k = _tests(samples, d)
    device = generator.device if generator is not None else like.device
    test = torch.randn(k, d, generator=generator, dtype=like.dtype, device=device).to(like.device)
    x = Sketch.of(matrix, test)
    h = x.aq @ x.q.T
    h = (h + h.T) / 2
    w = x.q @ test.T
    apart = w - x.s * (x.s * w).sum(0)  # what of a vector lies in the range of the others
    rest = (w * x.r).sum(0) - 2 * (apart * x.r).sum(0) + (apart * (h @ apart)).sum(0)
    left = test.square().sum(1) - apart.square().sum(0)
    known = h.diagonal().sum() - (x.s * (h @ x.s)).sum(0)
    return mean_estimate(known + (d - k + 1) / left * rest)


def xdiag(matrix: Matrix, d: int, samples: int, like: Tensor, generator: torch.Generator | None = None) -> Estimate:
    """The diagonal ``[d]`` by XDiag, exact where the rank is below ``samples / 2``."""
    k = _tests(samples, d)
    x = Sketch.of(matrix, rademacher(k, d, like=like, generator=generator))
    seen, product = x.s.T @ x.q, x.s.T @ x.aq  # [k d]
    rest = x.test * (x.s * x.r).sum(0).unsqueeze(1) * seen
    return mean_estimate((x.q * x.aq).sum(0) - seen * product + rest)


def _tests(samples: int, d: int) -> int:
    require_samples(samples, 4)
    return min(samples // 2, d)


TRACES = {"hutchinson": hutchinson, "hutch++": hutchpp, "xtrace": xtrace}
DIAGONALS = {"hutchinson": hutchinson_diagonal, "xdiag": xdiag}


def estimator_of(what: str, offered: dict[str, Callable[..., Estimate]], estimator: str) -> Callable[..., Estimate]:
    """The one of those ``offered`` that is named; raises :class:`ArgumentError`."""
    if estimator not in offered:
        raise ArgumentError(
            f"estimator is {estimator!r}; expected one of {sorted(offered)}, or None for the exact {what}"
        )
    return offered[estimator]
