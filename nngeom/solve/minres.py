"""MINRES: solves with symmetric matrices that need not be positive, for many right-hand sides at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nngeom.core.errors import NonFiniteError, SingularError
from nngeom.solve.cg import Unsolved, most_steps, residuals

STALLED = 2  # rounds that hardly reduce the largest residual


def minres(
    matrix: Callable[[Tensor], Tensor],
    b: Tensor,
    tol: float = 1e-6,
    max_steps: int | None = None,
    x0: Tensor | None = None,
    *,
    strict: bool = True,
) -> Tensor:
    """``x`` with ``|matrix(x) - b| <= tol |b|`` for a symmetric, non-singular ``matrix``; ``b (*batch, d)``.

    The residual is taken anew when the recurrence says it is small, and what is left of it solved for. ``max_steps``,
    ``x0`` and ``strict`` as for conjugate gradients. Raises :class:`SingularError` where residuals stay, and are next
    to orthogonal to the range of the matrix; :class:`ConvergenceError` after ``max_steps``. Source: Paige and Saunders
    1975.
    """
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else b - matrix(x)
    size, most = b.norm(dim=-1, keepdim=True), most_steps(b, max_steps)
    reached, left, stalled = residuals(r, size), most, 0
    while not bool((reached <= tol).all()):
        unsolved = Unsolved("MINRES", x, reached, tol, most)
        if stalled == STALLED:
            _require_range(matrix, r, reached > tol)
        if left <= 0 or stalled == STALLED or not bool(torch.isfinite(reached).all()):
            return unsolved.unless(strict=strict)
        step, used = _round(matrix, r, torch.where(reached <= tol, torch.inf, 0.5 * tol * size), left)
        rest = b - matrix(x + step)
        closer = residuals(rest, size) < reached
        x, r = torch.where(closer, x + step, x), torch.where(closer, rest, r)
        new, left = residuals(r, size), left - max(1, used)
        stalled = stalled + 1 if float(new.max()) > 0.9 * float(reached.max()) else 0
        reached = new
    return x


def _require_range(matrix: Callable[[Tensor], Tensor], r: Tensor, left: Tensor) -> None:
    """Raise where ``matrix(r)`` vanishes beside ``matrix`` of other vectors: what is ``left`` has no solution."""
    other = torch.randn(r.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(r)
    usual = matrix(other).norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True)
    here = matrix(r).norm(dim=-1, keepdim=True) / r.norm(dim=-1, keepdim=True)
    if bool(((here <= 1e-3 * usual) & left).any()):
        raise SingularError(
            "MINRES left a residual that the matrix maps next to zero: it is singular at this damping; use another "
            "damping, or a representation with eigenvalues and Cutoff(x)"
        )


def _round(matrix: Callable[[Tensor], Tensor], b: Tensor, goal: Tensor, most: int) -> tuple[Tensor, int]:
    """``x`` whose residual ``|b - matrix(x)|`` is below ``goal [*b, 1]`` by the recurrence, and the steps it took."""
    tiny = torch.finfo(b.dtype).tiny
    beta = b.norm(dim=-1, keepdim=True)
    v, before = b / beta.clamp_min(tiny), torch.zeros_like(b)
    x, w, w_before = torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b)
    c, s, c_before, s_before = (
        torch.ones_like(beta),
        torch.zeros_like(beta),
        torch.ones_like(beta),
        torch.zeros_like(beta),
    )
    rest, beta, scale = beta.clone(), torch.zeros_like(beta), torch.zeros_like(beta)
    for step in range(most):
        active = rest.abs() > goal
        if not bool(active.any()):
            return x, step
        p = matrix(v)
        alpha = (v * p).sum(-1, keepdim=True)
        p = p - alpha * v - beta * before
        following = p.norm(dim=-1, keepdim=True)
        # the last column of the tridiagonal matrix after both rotations before: [epsilon, delta, gamma]
        epsilon, bar = s_before * beta, c_before * beta
        delta, gamma = c * bar + s * alpha, c * alpha - s * bar
        radius = torch.hypot(gamma, following)
        scale = torch.maximum(scale, torch.maximum(alpha.abs(), following))
        solid = torch.hypot(gamma, c * following) > torch.finfo(b.dtype).eps ** 0.5 * scale  # of |A r| / |r|, and |A|
        if not bool((torch.isfinite(following) | ~active).all()):
            raise NonFiniteError("MINRES met NaN; check the vector, the inputs and the parameters")
        active = active & solid
        safe = torch.where(solid, radius, torch.ones_like(radius))
        c_before, s_before, c, s = c, s, gamma / safe, following / safe
        w, w_before = (v - delta * w - epsilon * w_before) / safe, w
        x = x + torch.where(active, c * rest * w, torch.zeros_like(w))
        rest = torch.where(active, -s * rest, torch.zeros_like(rest))
        before, v, beta = v, p / following.clamp_min(tiny), following
    return x, most
