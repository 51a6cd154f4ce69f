"""Conjugate gradients, preconditioned, for many right-hand sides at once; says when it has not converged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ConvergenceError, NonFiniteError, SingularError


def conjugate_gradient(
    matrix: Callable[[Tensor], Tensor],
    b: Tensor,
    tol: float = 1e-6,
    max_steps: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    x0: Tensor | None = None,
    *,
    strict: bool = True,
) -> Tensor:
    """``x`` with ``|matrix(x) - b| <= tol |b|`` for a symmetric positive definite ``matrix``; ``b (*batch, d)``.

    At most ``max_steps`` steps (default ``10 d``, at most 10 000) from the first guess ``x0`` (zero by default), each
    one product with all vectors of the batch; a vector that has converged is left alone. Raises
    :class:`ConvergenceError`, or where not ``strict`` returns what was reached, :class:`SingularError` where the matrix
    shows a direction of no or negative curvature, and :class:`NonFiniteError` where ``b`` or a product holds NaN.
    """
    apply = preconditioner or (lambda r: r)
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b - matrix(x) if x0 is not None else b.clone()
    size = b.norm(dim=-1, keepdim=True)
    goal = tol * size
    z = apply(r)
    p = z.clone()
    rz = (r * z).sum(-1, keepdim=True)
    steps = most_steps(b, max_steps)
    for _ in range(steps):
        active = ~(r.norm(dim=-1, keepdim=True) <= goal)  # NaN is not converged
        if not bool(active.any()):
            return x
        mp = matrix(p)
        curvature = (p * mp).sum(-1, keepdim=True)
        if bool((active & ~(curvature > 0)).any()):
            if bool(curvature.isnan().any()):
                raise NonFiniteError("conjugate gradients met NaN; check the vector, the inputs and the parameters")
            raise SingularError(
                "conjugate gradients met a direction of no or negative curvature; use a larger damping, or where the "
                "matrix is meant to have negative eigenvalues indefinite=True"
            )
        alpha = torch.where(
            active, rz / torch.where(active, curvature, torch.ones_like(curvature)), torch.zeros_like(rz)
        )
        x = x + alpha * p
        r = r - alpha * mp
        z = apply(r)
        new = (r * z).sum(-1, keepdim=True)
        beta = torch.where(active, new / torch.where(active, rz, torch.ones_like(rz)), torch.zeros_like(rz))
        p = z + beta * p
        rz = new
    reached = residuals(r, size)
    if bool((reached <= tol).all()):
        return x
    return Unsolved("conjugate gradients", x, reached, tol, steps).unless(strict=strict)


def most_steps(b: Tensor, max_steps: int | None) -> int:
    """``max_steps``, checked; by default ten times the side of ``b [*b, d]``, and at most 10 000."""
    if max_steps is None:
        return min(10 * b.shape[-1], 10_000)
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0:
        raise ArgumentError(f"max_steps is {max_steps!r}; expected a whole number of at least 0, or None")
    return max_steps


def residuals(r: Tensor, size: Tensor) -> Tensor:
    """The lengths of ``r [*b, d]`` relative to ``size [*b, 1]``, ``[*b, 1]``; zero where both are."""
    result: Tensor = r.norm(dim=-1, keepdim=True) / size.clamp_min(torch.finfo(r.dtype).tiny)
    return result


@dataclass(frozen=True)
class Unsolved:
    """The ``iterate`` after all ``steps``, and its relative residuals ``reached [*b, 1]``, above ``tol``."""

    method: str
    iterate: Tensor
    reached: Tensor
    tol: float
    steps: int

    def unless(self, *, strict: bool) -> Tensor:
        """The iterate; raises :class:`ConvergenceError` where ``strict``, or where it is not finite."""
        finite = bool(torch.isfinite(self.iterate).all()) and bool(torch.isfinite(self.reached).all())
        if not finite:
            raise NonFiniteError(f"{self.method} met NaN; check the vector, the inputs and the parameters")
        if not strict:
            return self.iterate
        raise ConvergenceError(
            f"{self.method} reached a relative residual of {float(self.reached.max()):.2e} in {self.steps} steps, "
            f"expected {self.tol:.2e}; use a larger damping, more max_steps, a preconditioner, or a larger tol, or "
            "take what was reached with strict=False",
            self.iterate,
            self.reached.squeeze(-1),
        )


def refined(
    matrix: Callable[[Tensor], Tensor],
    b: Tensor,
    tol: float = 1e-6,
    max_steps: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """:func:`conjugate_gradient`, begun again from where it got while the true residual is above twice ``tol``.

    ``matrix``, ``b``, ``max_steps``, ``preconditioner``, and errors: as there, for every beginning.
    """
    x, goal = conjugate_gradient(matrix, b, tol, max_steps, preconditioner), 2 * tol * b.norm(dim=-1)
    for _ in range(3):
        reached = (b - matrix(x)).norm(dim=-1)
        if bool((reached <= goal).all()):
            return x
        x = conjugate_gradient(matrix, b, tol, max_steps, preconditioner, x)
    raise ConvergenceError(
        f"conjugate gradients reached a residual of {float(reached.max()):.2e}, expected {float(goal.min()):.2e}; "
        "use a larger damping or a larger tol"
    )
