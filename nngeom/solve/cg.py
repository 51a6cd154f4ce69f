"""Conjugate gradients, preconditioned, for many right-hand sides at once; says when it has not converged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nngeom.core.errors import ConvergenceError, NonFiniteError, SingularError


def conjugate_gradient(
    matrix: Callable[[Tensor], Tensor],
    b: Tensor,
    tol: float = 1e-6,
    max_iter: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    x0: Tensor | None = None,
) -> Tensor:
    """``x`` with ``|matrix(x) - b| <= tol |b|`` for a symmetric positive definite ``matrix``; ``b (*batch, d)``.

    At most ``max_iter`` steps (default ``10 d``, at most 10 000), each one product with all vectors of the batch; a
    vector that has converged is left alone. Raises :class:`ConvergenceError` with the residual reached,
    :class:`SingularError` where the matrix shows a direction of no or negative curvature, and
    :class:`NonFiniteError` where ``b`` or a product holds NaN.
    """
    apply = preconditioner or (lambda r: r)
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b - matrix(x) if x0 is not None else b.clone()
    size = b.norm(dim=-1, keepdim=True)
    goal = tol * size
    z = apply(r)
    p = z.clone()
    rz = (r * z).sum(-1, keepdim=True)
    steps = min(10 * b.shape[-1], 10_000) if max_iter is None else max_iter
    for _ in range(steps):
        active = ~(r.norm(dim=-1, keepdim=True) <= goal)  # NaN is not converged
        if not bool(active.any()):
            return x
        mp = matrix(p)
        curvature = (p * mp).sum(-1, keepdim=True)
        if bool((active & ~(curvature > 0)).any()):
            if bool(curvature.isnan().any()):
                raise NonFiniteError("conjugate gradients met NaN; check the vector, the inputs and the parameters")
            raise SingularError("conjugate gradients met a direction of no or negative curvature; use a larger damping")
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
    reached = r.norm(dim=-1, keepdim=True)
    if bool((reached <= goal).all()):
        return x
    worst = float((reached / size.clamp_min(torch.finfo(b.dtype).tiny)).max())
    raise ConvergenceError(
        f"conjugate gradients reached a relative residual of {worst:.2e} in {steps} steps, expected {tol:.2e}; "
        "use a larger damping, more max_iter, a preconditioner, or a larger tol"
    )


def refined(
    matrix: Callable[[Tensor], Tensor],
    b: Tensor,
    tol: float = 1e-6,
    max_iter: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """:func:`conjugate_gradient`, begun again from where it got while the true residual is above twice ``tol``.

    ``matrix``, ``b``, ``max_iter``, ``preconditioner``, and errors: as there, for every beginning.
    """
    x, goal = conjugate_gradient(matrix, b, tol, max_iter, preconditioner), 2 * tol * b.norm(dim=-1)
    for _ in range(3):
        reached = (b - matrix(x)).norm(dim=-1)
        if bool((reached <= goal).all()):
            return x
        x = conjugate_gradient(matrix, b, tol, max_iter, preconditioner, x)
    raise ConvergenceError(
        f"conjugate gradients reached a residual of {float(reached.max()):.2e}, expected {float(goal.min()):.2e}; "
        "use a larger damping or a larger tol"
    )
