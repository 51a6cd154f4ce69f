"""Lanczos tridiagonalisation with full reorthogonalisation: leading eigenpairs of a symmetric operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError


def tridiagonalize(matrix: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """``T [m, m]`` and orthonormal ``Q [m, d]`` with ``Q matrix Q^T = T``, ``m <= steps``; stops when the space is
    exhausted.
    """
    q = start / start.norm()
    basis, alphas, betas = [q], [], []
    for j in range(steps):
        w = matrix(basis[-1])
        alphas.append(torch.dot(w, basis[-1]))
        stacked = torch.stack(basis)
        for _ in range(2):  # twice is enough
            w = w - (stacked @ w) @ stacked
        beta = w.norm()
        scale = torch.stack(alphas).abs().max()
        if j + 1 == steps or bool(beta <= 10 * torch.finfo(w.dtype).eps * scale):
            break
        betas.append(beta)
        basis.append(w / beta)
    t = torch.diag(torch.stack(alphas))
    if betas:
        off = torch.stack(betas[: len(alphas) - 1])
        t = t + torch.diag(off, 1) + torch.diag(off, -1)
    return t, torch.stack(basis[: len(alphas)])


def lanczos(
    matrix: Callable[[Tensor], Tensor], start: Tensor, k: int, steps: int | None = None, tol: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest eigenvalues, descending ``[k]``, and their vectors ``[k, d]``.

    The Krylov space grows until the residuals of the ``k`` largest pairs are below ``tol`` times the largest
    eigenvalue, or to ``steps`` vectors where that is given.
    """
    d = start.numel()
    if not 1 <= k <= d:
        raise ArgumentError(f"k is {k}; expected between 1 and {d}")
    size = steps if steps is not None else min(d, max(2 * k + 20, 40))
    while True:
        t, q = tridiagonalize(matrix, start, min(size, d))
        values, vectors = torch.linalg.eigh(t)
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
        found = (vectors.T @ q).contiguous()
        residual = torch.stack([(matrix(x) - v * x).norm() for v, x in zip(values, found)])
        exhausted = len(t) < min(size, d) or size >= d
        if steps is not None or exhausted or bool((residual <= tol * values.abs().max()).all()):
            return values, found
        size = min(d, 2 * size)
