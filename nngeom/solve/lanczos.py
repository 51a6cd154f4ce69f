"""Eigenpairs at the ends of the spectrum of a symmetric operator, by Lanczos steps with thick restarts.

Letters: ``d`` side, ``m`` vectors of the basis, ``k`` wanted pairs. Every new vector is made orthogonal to the whole
basis by matrix products, so that no eigenvalue appears more often than it is one; and because one start vector has only
one direction of every eigenspace, pairs that have converged are asked again from a random vector orthogonal to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.errors import ArgumentError, ConvergenceError, NonFiniteError

MOST = 10_000  # products, unless told otherwise
LOOKS = 4  # at what has converged, while the basis is filled
KEPT = 5  # tenths of the vectors beyond those wanted that survive a restart
LEAST_ASKED = 15  # products from a random vector: of a separate eigenvalue it shows a million parts by then
MOST_ASKED = 1  # fillings of the basis in which a random vector that leaves doubt is followed


@dataclass(frozen=True)
class Ritz:
    """Pairs of the projected matrix, the wanted ones first: ``values [m]``, ``vectors [m, m]`` as columns, and
    ``residuals [m]``; ``scale``: the largest absolute value."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    scale: float


@dataclass(frozen=True)
class Pairs:
    """``values [k]``, ``vectors [k, d]`` and ``residuals [k]``, relative to the largest absolute value."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class Basis:
    """Orthonormal rows ``q [m + 1, d]`` and the projected matrix ``h [m, m]``; ``size``: the rows that were multiplied.

    ``beta`` is the norm of what the last product left outside of these; it is row ``size``, normalised.
    """

    def __init__(self, matrix: Callable[[Tensor], Tensor], start: Tensor, m: int):
        self.matrix, self.m, self.d = matrix, m, start.numel()
        self.q = start.new_zeros(m + 1, self.d)
        self.h = torch.zeros(m, m, dtype=torch.float64)
        self.size, self.beta, self.products, self.largest = 0, 0.0, 0, 0.0
        self._seeds = torch.Generator().manual_seed(0)  # of the directions that a start vector lacks
        self._put(start, 0)

    def extend(self, to: int) -> None:
        """Products with the last row until ``size`` is ``to``."""
        while self.size < to:
            self._step()

    def _step(self) -> None:
        j = self.size
        w = self.matrix(self.q[j])
        self.products += 1
        first = max(0, j - 1)  # what three terms of the recurrence take away comes first
        c = self.q.new_zeros(j + 1)
        c[first:] = self.q[first : j + 1] @ w
        w = w - c[first:] @ self.q[first : j + 1]
        w, c, beta = self._orthogonal(w, c)
        column = c.cpu().double()
        self.h[: j + 1, j], self.h[j, : j + 1] = column, column
        self.largest = max(self.largest, float(column.abs().max()), beta)
        self.size, self.beta = j + 1, beta
        if self.size == self.d or beta <= 10 * torch.finfo(w.dtype).eps * self.largest:
            self.beta = 0.0
            self.renew()
        else:
            self.q[self.size] = w / beta

    def _orthogonal(self, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor, float]:
        """``w`` less its part along the first rows, one for each of the coefficients ``c``, to which those of this part
        are added; and its norm."""
        basis, before = self.q[: len(c)], float(w.norm())
        if not math.isfinite(before):
            raise NonFiniteError("a product of Lanczos steps is not finite; check the inputs and the parameters")
        after = before
        for _ in range(3):  # twice is enough, once where little was taken away
            part = basis @ w
            w, c = w - part @ basis, c + part
            after = float(w.norm())
            if after > 0.7 * before:
                break
            before = after
        return w, c, after

    def renew(self) -> None:
        """The next row becomes a random direction that the basis lacks, where it lacks one."""
        if self.size < self.d:
            fresh = torch.randn(self.d, generator=self._seeds, dtype=torch.float64)
            self._put(fresh.to(self.q.dtype).to(self.q.device), self.size)

    def _put(self, x: Tensor, row: int) -> None:
        x, _, norm = self._orthogonal(x / x.norm(), x.new_zeros(row))
        self.q[row] = x / norm

    def ritz(self, order: Callable[[Tensor], Tensor]) -> Ritz:
        """Pairs of the projected matrix, sorted by ``order``."""
        values, vectors = linalg.eigh(self.h[: self.size, : self.size])
        at = order(values)
        values, vectors = values[at], vectors[:, at]
        return Ritz(values, vectors, self.beta * vectors[-1].abs(), float(values.abs().max()))

    def restart(self, ritz: Ritz, kept: int) -> None:
        """The first ``kept`` pairs in the place of the basis, and the direction they lead to."""
        rotation = ritz.vectors[:, :kept].T.to(self.q)
        following = self.q[self.size].clone()
        self.q[:kept] = rotation @ self.q[: self.size]
        self.q[kept] = following
        self.h.zero_()
        self.h[:kept, :kept] = ritz.values[:kept].diag()
        self.size = kept

    def pairs(self, ritz: Ritz, k: int) -> Pairs:
        """The first ``k``."""
        vectors = ritz.vectors[:, :k].T.to(self.q) @ self.q[: self.size]
        return Pairs(ritz.values[:k], vectors, ritz.residuals[:k] / (ritz.scale or 1.0))


def _largest(values: Tensor) -> Tensor:
    return values.argsort(descending=True)


def _smallest(values: Tensor) -> Tensor:
    return values.argsort()


def _both(values: Tensor) -> Tensor:
    """Largest, smallest, second largest, second smallest, ..."""
    down = values.argsort(descending=True)
    half = -(-len(down) // 2)
    out = torch.empty_like(down)
    out[::2], out[1::2] = down[:half], down[half:].flip(0)
    return out


ENDS = {"largest": _largest, "smallest": _smallest, "both": _both}


@torch.no_grad()
def lanczos(
    matrix: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    which: str = "largest",
    tol: float = 1e-6,
    max_steps: int | None = None,
    *,
    strict: bool = True,
) -> tuple[Tensor, Tensor]:
    """``k`` eigenvalues ``[k]`` of a symmetric ``matrix`` and their orthonormal vectors ``[k, d]``.

    ``which``: ``"largest"``, descending, ``"smallest"``, ascending, or ``"both"``: half from each end, one more of the
    largest where ``k`` is odd, descending. ``start (d,)``: the first vector. Goes on until residuals are below ``tol``
    times the largest absolute eigenvalue met, through ``max_steps`` products at most (ten times the side and at most
    10 000 by default).

    Raises :class:`ConvergenceError`, unless not ``strict``; its ``iterate`` is what was reached. No gradient passes.
    Source: Wu and Simon 2000 (thick restarts).
    """
    d = start.numel()
    require_wanted(k, d, which)
    most = max(k, min(10 * d, MOST)) if max_steps is None else max_steps
    if most < k:
        raise ArgumentError(f"max_steps is {max_steps} for k={k}; expected at least one product a pair")
    basis = Basis(matrix, start, min(d, max(2 * k + 20, 40)))
    pairs, converged = _iterate(basis, k, ENDS[which], tol / 2, most)
    at = pairs.values.argsort(descending=which != "smallest")
    found = pairs.values[at].to(start), pairs.vectors[at.to(start.device)]
    if strict and not converged:
        raise ConvergenceError(
            f"Lanczos reached a relative residual of {float(pairs.residuals.max()):.2e} in {basis.products} products "
            f"for k={k}, expected {tol:.2e}; allow more max_steps, a larger tol, or take what was reached with "
            "strict=False",
            found,
            pairs.residuals[at].to(start),
        )
    return found


def _iterate(basis: Basis, k: int, order: Callable[[Tensor], Tensor], tol: float, most: int) -> tuple[Pairs, bool]:
    """The first ``k`` pairs, and whether they have converged.

    Those that have are kept beside a random direction, until it shows a value that belongs among them, or none.
    """
    pairs, asked = None, 0  # products since the random direction
    stride = 8 if basis.m**2 < basis.d else max(8, (basis.m - k) // LOOKS)  # a look costs a product or less
    while True:
        before = basis.products
        ahead = LEAST_ASKED if pairs is not None and asked == 0 else stride
        basis.extend(min(max(basis.size, k) + ahead, basis.m, basis.size + most - before))
        ritz = basis.ritz(order)
        if basis.size == basis.d:
            return basis.pairs(ritz, k), True
        asked += basis.products - before
        if pairs is not None:
            if bool(((ritz.values[:k] - pairs.values).abs() > tol * ritz.scale).any()):
                pairs = None
            elif asked >= MOST_ASKED * (basis.m - k) or (asked >= LEAST_ASKED and _is_apart(ritz, k, order, tol)):
                return pairs, True
        if pairs is None and bool((ritz.residuals[:k] <= tol * ritz.scale).all()):
            pairs, asked = basis.pairs(ritz, k), 0
            basis.restart(ritz, k)
            basis.renew()
        if basis.products >= most:
            return pairs or basis.pairs(ritz, k), pairs is not None
        if basis.size == basis.m:
            basis.restart(ritz, k + KEPT * (basis.m - k) // 10)


def _is_apart(ritz: Ritz, k: int, order: Callable[[Tensor], Tensor], tol: float) -> bool:
    """Whether no other value, within its residual, would be one of the first ``k``."""
    for sign in (1.0, -1.0):
        room = (ritz.residuals[k:] - tol * ritz.scale).clamp_min(0)
        moved = torch.cat([ritz.values[:k], ritz.values[k:] + sign * room])
        if set(order(moved)[:k].tolist()) != set(range(k)):
            return False
    return True


def require_wanted(k: int, d: int, which: str) -> None:
    """Raise :class:`ArgumentError` unless ``k`` of ``d`` eigenvalues can be asked for at this end."""
    if not isinstance(k, int) or not 1 <= k <= d:
        raise ArgumentError(f"k is {k!r}; expected a whole number between 1 and {d}")
    if which not in ENDS:
        raise ArgumentError(f"which is {which!r}; expected one of {list(ENDS)}")
