"""Kernels as tensors: what the quantities of function space take, centring, and pictures of one class against
another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.errors import ArgumentError
from nngeom.core.given_plainly import require_real_tensor, require_whole


def kernel_tensor(K: Any) -> Tensor:
    """``(c, n, c, m)`` of an FMat, of such a tensor, or of an ``(n, m)`` matrix (one output); raises
    :class:`NonFiniteError` on NaN or infinity.
    """
    t = _shaped(K)
    require_real_tensor(t, "the kernel")
    return t


def _shaped(K: Any) -> Tensor:
    t = K if isinstance(K, Tensor) else getattr(K, "tensor", None)
    if isinstance(t, Tensor) and t.ndim == 2 and isinstance(K, Tensor):
        t = t[None, :, None, :]
    if isinstance(t, Tensor) and t.ndim == 3 and not isinstance(K, Tensor):  # one n x n block an output
        return torch.diag_embed(t.permute(1, 2, 0)).permute(2, 0, 3, 1)
    if isinstance(t, Tensor) and t.ndim == 2 and not isinstance(K, Tensor):  # a diagonal kernel
        return torch.diag(t.flatten()).view(*t.shape, *t.shape)
    if not isinstance(t, Tensor) or t.ndim != 4 or t.shape[0] != t.shape[2]:
        given = tuple(t.shape) if isinstance(t, Tensor) else type(K).__name__
        raise ArgumentError(f"the kernel is {given}; expected an FMat, a tensor (c, n, c, m) or a matrix (n, m)")
    return t


def square_kernel(K: Any) -> Tensor:
    """The ``(c n, c n)`` matrix of a kernel on one set of points, rows ``output * n + example``."""
    t = kernel_tensor(K)
    c, n, _, m = t.shape
    if n != m:
        raise ArgumentError(f"the kernel compares {n} points with {m} others; expected one set of points")
    return t.reshape(c * n, c * n)


def center(K: Any, *, how: bool | str = True) -> Tensor:
    """The kernel of centred features, ``(c, n, c, m)``.

    ``K``: an FMat or tensor. ``how``: ``True`` or ``"features"``: the mean over examples is subtracted output by
    output; ``"global"``: over examples and outputs together; ``False``: as it is. What is left at rounding level
    (copies of one example) is zero.
    """
    t = kernel_tensor(K)
    if how is False:
        return t
    if how is not True and how not in ("features", "global"):
        raise ArgumentError(f"centered is {how!r}; expected True, 'features', 'global' or False")
    left, right = ((1,), (3,)) if how != "global" else ((0, 1), (2, 3))
    centred = t - t.mean(left, keepdim=True)
    return above_rounding(centred - centred.mean(right, keepdim=True), t)


def above_rounding(difference: Tensor, whole: Tensor) -> Tensor:
    """A difference of numbers as large as ``whole``, zero where its norm says that it is their rounding errors."""
    real = difference.norm() > 32 * torch.finfo(whole.dtype).eps * whole.norm()
    return torch.where(real, difference, torch.zeros_like(difference))


def require_symmetric(K: Any) -> Tensor:
    """The ``(c n, c n)`` matrix, symmetrised against rounding; raises :class:`ArgumentError` where more is to do."""
    m = square_kernel(K)
    if m.is_floating_point():
        off, norm = (m - m.T).norm(), m.norm()
        if off > torch.finfo(m.dtype).eps ** 0.5 * norm:
            raise ArgumentError(
                f"the kernel is not symmetric, by {float(off / norm):.1g} of its norm; expected that of one set of "
                "points with itself"
            )
    return (m + m.T) / 2


def normalised_gram(K: Any) -> Tensor:
    """``K_ij / sqrt(K_ii K_jj)`` of a kernel ``K``, ``(c n, c n)``: cosines of the features; zero features give 0."""
    m = square_kernel(K)
    squares = m.diagonal()
    if squares.numel() and bool(squares.min() < -(torch.finfo(m.dtype).eps ** 0.5) * squares.abs().max()):
        raise ArgumentError(f"the kernel has {float(squares.min()):.3g} on its diagonal; expected squared norms")
    scale = squares.clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale.clamp_min(torch.finfo(m.dtype).tiny), torch.zeros_like(scale))
    return inverse[:, None] * m * inverse[None, :]


def kernel_pca(K: Any, k: int = 2) -> Tensor:
    """``(c n, k)``: the points in the ``k`` leading principal directions of their centred features, from their kernel
    ``K (c, n, c, n)``.

    Centring is output by output; a column is an eigenvector times the root of its eigenvalue, its largest entry
    positive.
    """
    require_whole(k, "k")
    require_symmetric(K)
    values, vectors = linalg.eigh(require_symmetric(center(K)))
    if k > len(values):
        raise ArgumentError(f"k is {k}; expected between 1 and {len(values)}")
    return fix_signs(vectors[:, -k:].flip(1)) * values[-k:].flip(0).clamp_min(0).sqrt()


def fix_signs(vectors: Tensor) -> Tensor:
    """Columns ``(n, k)`` with the sign that makes the entry of largest modulus positive."""
    index = vectors.abs().argmax(0, keepdim=True)
    sign = vectors.gather(0, index).sign()
    return vectors * torch.where(sign == 0, torch.ones_like(sign), sign)
