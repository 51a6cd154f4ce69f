"""The trace of the logarithm of a matrix near the identity, estimated from few products.

With ``E = B - I``: ``log B = E - E^2 / 2 + E^3 / 3 - ...``. Where ``tr E``, and ``tr E^2`` too, are known, only what is
beyond them is left to random signs, by Gauss quadrature along Lanczos steps (Ubaru, Chen and Saad 2017): in the
benchmark of sums its spread is a thousandth of that of ``log B``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import memory
from nngeom.core.errors import ArgumentError, SingularError
from nngeom.solve.hutchinson import Estimate, mean_estimate, rademacher, require_samples
from nngeom.solve.slq import growing, quadrature

FIRST = 8  # signs at first: standard errors of fewer are not to be relied on


@dataclass(frozen=True)
class Quadrature:
    """At most so many Lanczos ``steps`` from at most so many random ``samples``, drawn by a ``generator``: fewer where
    the standard error of an entry of the diagonal is ``tol`` already.
    """

    steps: int = 16
    samples: int = 16
    generator: torch.Generator | None = None
    tol: float = 1e-5

    def checked(self) -> Quadrature:
        """Raises :class:`ArgumentError` for less than two steps or samples, of which none have an error, or a ``tol``
        that is none.
        """
        require_samples(self.samples, 2)
        if self.steps < 2:
            raise ArgumentError(f"steps is {self.steps}; expected at least 2")
        if not (isinstance(self.tol, (int, float)) and 0 <= self.tol < math.inf):
            raise ArgumentError(f"tol is {self.tol!r}; expected the standard error a parameter, a number >= 0")
        return self


@dataclass(frozen=True)
class NearIdentity:
    """``B`` by its products with ``x [*b, d]``, and what is known of ``E = B - I``: ``tr E``, and ``tr E^2`` or not."""

    product: Callable[[Tensor], Tensor]
    d: int
    first: Tensor
    second: Tensor | None

    def beyond(self, values: Tensor) -> Tensor:
        """``log`` of eigenvalues without what is known of it."""
        e = values - 1
        rest = values.log() - e
        return rest if self.second is None else rest + e.square() / 2

    @property
    def known(self) -> Tensor:
        """The trace of what :meth:`beyond` leaves out."""
        return self.first if self.second is None else self.first - self.second / 2


@torch.no_grad()
def log_trace(matrix: NearIdentity, how: Quadrature, *, definite: bool) -> Estimate:
    """``tr log B`` with a standard error: that of the mean over signs, and beside it what the last step changed.

    ``how``: where to stop; ``definite``: whether it is known that ``B`` is, else all steps are taken, which see more
    of it. Raises :class:`SingularError` where an eigenvalue is seen that is not positive.
    """
    goal, like = how.tol * matrix.d, matrix.first
    means: list[Tensor] = []
    changes: list[Tensor] = []
    while True:
        drawn = sum(map(len, means))
        new = min(max(FIRST, drawn), how.samples - drawn)
        new = memory.step(new, (how.steps + 4) * matrix.d * like.element_size())
        signs = rademacher(new, matrix.d, like=like, generator=how.generator)
        mean, change = _along(matrix, signs, how.steps, goal if definite else 0.0)
        means.append(mean)
        changes.append(change)
        found = mean_estimate(torch.cat(means))
        error = torch.hypot(found.standard_error, torch.stack(changes).max())
        if drawn + new >= how.samples or float(error) <= goal:
            return Estimate(matrix.known + found.value, error)


def _along(matrix: NearIdentity, signs: Tensor, steps: int, goal: float) -> tuple[Tensor, Tensor]:
    """``z^T f(B) z`` for every ``z`` of ``signs [m, d]``, ``f`` what is beyond, and by how much the last step changed
    their mean; two changes below ``goal`` are the last.
    """
    found: list[Tensor] = []
    for t in growing(matrix.product, signs / matrix.d**0.5, min(steps, matrix.d)):
        nodes, weights = quadrature(t)
        counted = weights > torch.finfo(signs.dtype).eps ** 2
        least = float(torch.where(counted, nodes, torch.inf).min())
        if least <= torch.finfo(signs.dtype).eps * float(nodes.abs().max()):
            raise SingularError(
                f"the sum shows the eigenvalue {least:.2e}, relative to a matrix near to it: it is singular or "
                "indefinite at this damping; use a larger one"
            )
        f = torch.where(counted, weights * matrix.beyond(nodes.clamp_min(least)), 0.0).sum(-1)
        found.append(matrix.d * f.to(signs))
        changes = [float((y - x).mean().abs()) for x, y in itertools.pairwise(found[-3:])]
        if len(changes) == 2 and max(changes) <= goal:
            break
    return found[-1], (found[-1] - found[-2]).mean().abs()
