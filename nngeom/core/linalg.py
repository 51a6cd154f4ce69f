"""Dense linear algebra that does not surprise: float64 eigendecompositions, exact Gram products, factors.

A *factor* is one side of a Kronecker product, batched over groups ``s``: dense ``[s, p, p]`` or, where it is exactly
or by choice diagonal, its diagonal ``[s, p]``. An eigenbasis of a diagonal factor is ``None``: the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core.errors import NonFiniteError, SingularError


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over examples are kept: at least float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def eigh(m: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and contiguous eigenvectors of symmetric ``m [..., p, p]``, computed in float64.

    LAPACK's divide and conquer can fail to converge on nearly degenerate matrices: the second try perturbs the
    diagonal by rounding-error size, the third takes the singular value decomposition.
    """
    if not torch.isfinite(m).all():
        raise NonFiniteError("eigendecomposition of a matrix with NaN or infinite entries; check the inputs and the model")
    x = m.double() if m.device.type != "mps" else m.cpu().double()
    try:
        values, vectors = torch.linalg.eigh(x)
    except RuntimeError:
        scale = x.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True)
        jitter = scale * 1e-14 * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype, device=x.device)
        try:
            values, vectors = torch.linalg.eigh(x + torch.diag_embed(jitter))
        except RuntimeError:
            vectors, _, _ = torch.linalg.svd(x)
            values = ((x @ vectors) * vectors).sum(-2)
            order = values.argsort(-1)
            values = values.gather(-1, order)
            vectors = vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
    return values.to(m), vectors.to(m).contiguous()


def gram(x: Tensor, blocks: int = 4) -> Tensor:
    """``x^T x`` for ``x [r, p]``, computing the upper blocks only and mirroring them."""
    p = x.shape[-1]
    if p < 512 or x.shape[0] < 64:
        return x.T @ x
    cuts = [p * j // blocks for j in range(blocks + 1)]
    out = x.new_empty(p, p)
    for lo, hi in zip(cuts[:-1], cuts[1:]):
        torch.mm(x[:, lo:hi].T, x[:, lo:], out=out[lo:hi, lo:])
        out[hi:, lo:hi] = out[lo:hi, hi:].T
    return out


def cholesky(m: Tensor, what: str) -> Tensor:
    """Lower Cholesky factor of ``m [..., p, p]``; raises :class:`SingularError` when ``m`` is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(m)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    scale = m.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True) if m.shape[-1] else pivots
    tiny = m.shape[-1] * torch.finfo(m.dtype).eps * scale
    if bool((info != 0).any()) or bool((pivots <= tiny).any()):
        raise SingularError(f"{what} is singular or indefinite; use a larger damping, or Cutoff(x) for a pseudo-inverse")
    return factor


# -- factors: dense [s, p, p] or diagonal [s, p] -----------------------------------------------------------------------


def is_diagonal(factor: Tensor) -> bool:
    """Whether a factor is kept as its diagonal."""
    return factor.ndim == 2


def factor_diag(factor: Tensor) -> Tensor:
    """``[s, p]``: the diagonal."""
    return factor if is_diagonal(factor) else factor.diagonal(dim1=-2, dim2=-1)


def factor_norm2(factor: Tensor) -> Tensor:
    """``[s]``: squared Frobenius norms."""
    return factor.square().flatten(1).sum(1)


def factor_eigh(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues ``[s, p]``, those within rounding error of zero set to zero, and eigenvectors ``[s, p, p]`` (``None``: the identity)."""
    if is_diagonal(factor):
        return factor.clamp_min(0), None
    values, vectors = eigh(factor)
    floor = values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
    return torch.where(values > floor, values, torch.zeros_like(values)), vectors


def factor_shift(factor: Tensor, shift: Tensor) -> Tensor:
    """``factor + shift * I`` with one shift a group, ``[s]``."""
    if is_diagonal(factor):
        return factor + shift[:, None]
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return factor + shift[:, None, None] * eye


def factor_inverse(factor: Tensor, what: str) -> Tensor:
    """The inverse factor; raises :class:`SingularError`."""
    if is_diagonal(factor):
        if bool((factor <= 0).any()):
            raise SingularError(f"{what} is singular; use a larger damping")
        return 1 / factor
    return torch.cholesky_inverse(cholesky(factor, what))


def left(factor: Tensor | None, x: Tensor, transpose: bool = False) -> Tensor:
    """``factor @ x`` over the rows of ``x [..., s, o, i]``."""
    if factor is None:
        return x
    if is_diagonal(factor):
        return factor.unsqueeze(-1) * x
    return (factor.mT if transpose else factor) @ x


def right(x: Tensor, factor: Tensor | None, transpose: bool = False) -> Tensor:
    """``x @ factor`` over the columns of ``x [..., s, o, i]``."""
    if factor is None:
        return x
    if is_diagonal(factor):
        return x * factor.unsqueeze(-2)
    return x @ (factor.mT if transpose else factor)
