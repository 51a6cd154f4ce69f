"""Dense linear algebra that does not surprise: float64 eigendecompositions, exact Gram products, factors.

A *factor* is one side of a Kronecker product, batched over groups ``s``: dense ``[s, p, p]`` or, where it is exactly or
by choice diagonal, its diagonal ``[s, p]``; until it is decomposed also its sketch, see :mod:`nngeom.core.sketch`. An
eigenbasis of a diagonal factor is ``None``: the identity, that of a sketch a :class:`CompletedBasis`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from nngeom.core import lapack
from nngeom.core.completed import CompletedBasis
from nngeom.core.errors import NonFiniteError, SingularError, UnsupportedError
from nngeom.core.low_rank_eigh import ROUNDINGS, low_rank_eigh
from nngeom.core.sketch import is_sketched, sketch_eigh

Basis = Tensor | CompletedBasis
INVERTED = 640  # a side up to which p / 2 columns and more take 0.6 to 0.8 of the time with an inverse, 0.9 above


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over examples are kept: at least float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def flat_rows(x: Tensor) -> Tensor:
    """``[k, *shape] -> [k, p]``, of single numbers and of nothing too."""
    return x.unsqueeze(1).flatten(1)


def eigh(m: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and contiguous eigenvectors of symmetric ``m [..., p, p]``, computed in float64.

    LAPACK's divide and conquer can fail to converge on nearly degenerate matrices: the second try perturbs the
    diagonal by rounding-error size, the third takes the singular value decomposition. Eigenvalues may have a gradient;
    eigenvectors only where eigenvalues are distinct, else the backward pass raises :class:`UnsupportedError`.
    """
    if not torch.isfinite(m).all():
        raise NonFiniteError(
            "eigendecomposition of a matrix with NaN or infinite entries; check the inputs and the model"
        )
    x = m.double() if m.device.type != "mps" else m.cpu().double()
    try:
        values, vectors = lapack.eigh(x)
    except RuntimeError:
        scale = x.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True)
        jitter = scale * 1e-14 * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype, device=x.device)
        try:
            values, vectors = lapack.eigh(x + torch.diag_embed(jitter))
        except RuntimeError:
            vectors, _, _ = torch.linalg.svd(x)
            values = ((x @ vectors) * vectors).sum(-2)
            order = values.argsort(-1)
            values = values.gather(-1, order)
            vectors = vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
    if vectors.requires_grad:
        vectors = _Distinct.apply(vectors, values.detach())  # type: ignore[no-untyped-call]
    return values.to(m), vectors.to(m).contiguous()


def svd(m: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors, the rows of the second, in float64; gradients as of :func:`eigh`."""
    _, values, vectors = torch.linalg.svd(m.double(), full_matrices=False)
    return values, _Distinct.apply(vectors, values.detach()) if vectors.requires_grad else vectors  # type: ignore[no-untyped-call]


class _Distinct(torch.autograd.Function):
    """Eigenvectors as they are; no gradient passes where eigenvalues ``[..., p]`` repeat: it would be infinite."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        gaps, scale = values.diff(dim=-1).abs(), values.abs().amax(-1, keepdim=True)
        if bool((g != 0).any()) and bool((gaps <= torch.finfo(values.dtype).eps ** 0.5 * scale).any()):
            raise UnsupportedError(
                "a gradient in the entries of a matrix, through eigenvectors of eigenvalues that repeat, is not "
                "offered; "
                "detach() the matrix that has a graph, or use PMatDense, whose solve with a number as damping "
                "needs none"
            )
        return g, None


def gram(x: Tensor) -> Tensor:
    """``x^T x`` for ``x [r, p]``, half of it computed."""
    return mirror_(add_gram_(None, x))


def add_gram_(total: Tensor | None, x: Tensor, scale: float = 1.0) -> Tensor:
    """``total + scale * x^T x`` in place (``None``: zero); entries below the diagonal may be missing until
    :func:`mirror_`.
    """
    p = x.shape[-1]
    beta = 0 if total is None else 1
    total = x.new_empty(p, p) if total is None else total
    if x.shape[0] * p * p < 2**23:
        return total.addmm_(x.T, x, beta=beta, alpha=scale)
    for lo, hi in strips(p):
        total[lo:hi, lo:].addmm_(x[:, lo:hi].T, x[:, lo:], beta=beta, alpha=scale)
    return total


def mirror_(total: Tensor, *, corners: bool = False) -> Tensor:
    """The lower half of ``total [p, p]`` from the upper one, in place; ``corners``: also where strips meet the
    diagonal.
    """
    p = total.shape[-1]
    for lo, hi in strips(p):
        if hi < p:
            total[hi:, lo:hi] = total[lo:hi, hi:].T
        if corners:
            corner = total[lo:hi, lo:hi]
            corner.copy_(corner.triu() + corner.triu(1).T)
    return total


@functools.cache
def strips(p: int) -> tuple[tuple[int, int], ...]:
    """A symmetric product in strips from the diagonal on; of 80 rows at least, in multiples of 16, they run best."""
    width = -(-p // max(1, min(8, round(p / 80))))
    width = -(-width // 16) * 16
    return tuple((lo, min(p, lo + width)) for lo in range(0, p, width))


def cholesky(m: Tensor, what: str, eps: float | None = None) -> Tensor:
    """Lower Cholesky factor of ``m [..., p, p]``; raises :class:`SingularError` when ``m`` is not positive definite.

    ``eps``: the rounding error of the entries, by default that of their dtype; pivots that it may have made are zero.
    """
    factor, info = torch.linalg.cholesky_ex(m)
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1).square()
    scale = m.detach().diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True) if m.shape[-1] else pivots
    tiny = m.shape[-1] * (torch.finfo(m.dtype).eps if eps is None else eps) * scale
    if bool((info != 0).any()) or bool((pivots <= tiny).any()):
        raise SingularError(
            f"{what} is singular or indefinite; use a larger damping, or Cutoff(x) for a pseudo-inverse"
        )
    return factor  # type: ignore[no-any-return]


def cholesky_logdet(m: Tensor, what: str) -> Tensor:
    """``log det m`` for each of ``m [..., p, p]``, in float64; raises :class:`SingularError` as :func:`cholesky`."""
    wide = m.double() if m.device.type != "mps" else m.cpu().double()
    pivots = cholesky(wide, what, torch.finfo(m.dtype).eps).diagonal(dim1=-2, dim2=-1)
    return 2 * pivots.log().sum(-1).to(m)


def is_diagonal(factor: Tensor) -> bool:
    """Whether a factor is kept as its diagonal."""
    return factor.ndim == 2


def factor_diag(factor: Tensor) -> Tensor:
    """``[s, p]``: the diagonal."""
    if is_sketched(factor):
        return factor[..., 0]
    return factor if is_diagonal(factor) else factor.diagonal(dim1=-2, dim2=-1)


def factor_norm2(factor: Tensor) -> Tensor:
    """``[s]``: squared Frobenius norms."""
    return factor.square().flatten(1).sum(1)


def factor_eigh(factor: Tensor) -> tuple[Tensor, Basis | None]:
    """Eigenvalues ``[s, p]`` and eigenvectors ``[s, p, p]`` (``None``: the identity), computed in float64, those of a
    float32 factor of low rank by :func:`low_rank_eigh`.

    Those below :data:`ROUNDINGS` of the largest in size, in the dtype of the factor, are set to zero: rounding of the
    sums left of a zero at most 3 in sums over 2000 batches, for sides of 16 to 1000, and grew with neither rank nor
    side. Negative ones stay: a factor may be one of minus a matrix.
    """
    if is_diagonal(factor):
        return factor, None
    values, vectors = sketch_eigh(factor) if is_sketched(factor) else low_rank_eigh(factor) or eigh(factor)
    floor = ROUNDINGS * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    zeros = values - values.detach() if values.requires_grad else torch.zeros_like(values)  # with their derivatives
    return torch.where(values.abs() > floor, values, zeros), vectors


def factor_shift(factor: Tensor, shift: Tensor) -> Tensor:
    """``factor + shift * I`` with one shift a group, ``[s]``."""
    if is_diagonal(factor):
        return factor + shift[:, None]
    shifted = factor.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
    return shifted


def factor_inverse(factor: Tensor, what: str) -> Tensor:
    """The inverse factor; raises :class:`SingularError`."""
    if is_diagonal(factor):
        if bool((factor <= 0).any()):
            raise SingularError(f"{what} is singular; use a larger damping")
        return 1 / factor
    return torch.cholesky_inverse(cholesky(factor, what))


def factor_solve(factor: Tensor, x: Tensor, what: str) -> Tensor:
    """``factor^-1 @ x`` over the rows of ``x [..., s, o, i]``; raises :class:`SingularError`."""
    if is_diagonal(factor):
        return left(factor_inverse(factor, what), x)
    root, p = cholesky(factor, what), factor.shape[-1]
    if p <= INVERTED and 2 * x.shape[-1] >= p and not root.requires_grad:
        return left(torch.cholesky_inverse(root), x)
    return torch.cholesky_solve(x, root.expand(*x.shape[:-2], -1, -1))


def left(factor: Basis | None, x: Tensor, *, transpose: bool = False) -> Tensor:
    """``factor @ x`` over the rows of ``x [..., s, o, i]``."""
    if factor is None:
        return x
    if isinstance(factor, CompletedBasis):
        return (factor.coordinates_of if transpose else factor.vectors_of)(x.mT).mT
    if is_diagonal(factor):
        return factor.unsqueeze(-1) * x
    return _product(factor.mT if transpose else factor, x)


def right(x: Tensor, factor: Basis | None, *, transpose: bool = False) -> Tensor:
    """``x @ factor`` over the columns of ``x [..., s, o, i]``."""
    if factor is None:
        return x
    if isinstance(factor, CompletedBasis):
        return (factor.vectors_of if transpose else factor.coordinates_of)(x)
    if is_diagonal(factor):
        return x * factor.unsqueeze(-2)
    return _product(x, factor.mT if transpose else factor)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y``, without what it costs to find out that nothing is broadcast."""
    return torch.bmm(x, y) if x.ndim == y.ndim == 3 and x.shape[0] == y.shape[0] else x @ y
