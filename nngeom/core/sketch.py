"""The leading eigenvectors of a long factor from its products with random vectors, and its diagonal.

A *sketched* factor ``[s, p, 1 + m]`` is its diagonal beside its products ``F W`` with ``m`` test vectors ``W``, always
the same of a side: sums and means of factors are those of their sketches. What it stands for is the Nystroem
approximation ``N = F W (W^T F W)^-1 W^T F``, of which a positive semi-definite ``F`` has nothing less (Tropp,
Yurtsever, Udell & Cevher 2017), and a diagonal in the basis that begins with the eigenvectors of ``N``, in place of the
rest ``R = F - N``, of which the diagonal is known, and that ``R W = 0``. Beyond the eigenvectors it is that of
``diag(R)``; along one of them what ``R`` would have if it were alike in all directions but those of ``W``; scaled such
that the trace is that of ``F``. Nothing is negative, and functions of it are as cheap as products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core.completed import CompletedBasis


def is_sketched(factor: Tensor) -> bool:
    """Whether a factor is kept as a sketch."""
    return factor.ndim == 3 and factor.shape[-1] != factor.shape[-2]


def side_of(factor: Tensor) -> int:
    """``p`` of any factor: dense, diagonal or sketched."""
    return factor.shape[-2] if is_sketched(factor) else factor.shape[-1]


def normal_vectors(p: int, m: int, like: Tensor) -> Tensor:
    """``[p, m]``: normally distributed, always the same."""
    generator = torch.Generator().manual_seed(p + 1)
    return torch.randn(m, p, generator=generator, dtype=torch.float32).T.to(like)


def sketch_of_diagonal(d: Tensor, m: int) -> Tensor:
    """The sketch of a diagonal factor ``d [s, p]``."""
    d = d.unsqueeze(-1)
    return torch.cat([d, d * normal_vectors(d.shape[1], m, d)], -1)


def sketch_eigh(sketch: Tensor) -> tuple[Tensor, CompletedBasis]:
    """Eigenvalues ``[s, p]`` and eigenvectors of what a sketched factor stands for, computed in float64."""
    diagonal, products = sketch[..., 0].double(), sketch[..., 1:].double()
    p, m = products.shape[-2:]
    w = normal_vectors(p, m, products)
    inner = w.mT @ products
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    floor = m * torch.finfo(sketch.dtype).eps * values.amax(-1, keepdim=True).clamp_min(0)
    known = values > floor
    roots = torch.where(known, values.where(known, torch.ones_like(values)).rsqrt(), torch.zeros_like(values))
    q, triangle = torch.linalg.qr(products @ (vectors * roots.unsqueeze(-2)))
    turn, singular, _ = torch.linalg.svd(triangle)
    u, leading = q @ turn, singular.square()
    rest = (diagonal - (u.square() @ leading.unsqueeze(-1)).squeeze(-1)).clamp_min(0)
    basis = CompletedBasis.of(u)
    outside = 1 - (torch.linalg.qr(w)[0].mT @ u).square().sum(-2)
    added = outside.clamp_min(0) * rest.sum(-1, keepdim=True) / (p - m)
    along = _diagonal_beyond(basis, rest)
    total = along.sum(-1, keepdim=True)
    left = (rest.sum(-1, keepdim=True) - added.sum(-1, keepdim=True)).clamp_min(0)
    along = along * torch.where(total > 0, left / total.where(total > 0, torch.ones_like(total)), total)
    return torch.cat([leading + added, along], -1).to(sketch), basis.map_tensors(lambda t: t.to(sketch).contiguous())


def _diagonal_beyond(basis: CompletedBasis, d: Tensor) -> Tensor:
    """``[s, p - r]``: ``q^T diag(d) q`` of the vectors ``q`` of a basis beyond the given ones, by their formula."""
    u, k, c, r = basis.u, basis.k, basis.c, basis.rank
    head, tail = u[:, :r], u[:, r:]
    inner = d[:, :r].unsqueeze(-1) * c
    crossed = k @ head.mT @ inner
    form = k @ (u.mT @ (d.unsqueeze(-1) * u)) @ k + c.mT @ inner - crossed - crossed.mT
    own = d[:, r:] * (1 - 2 * ((tail @ k) * tail).sum(-1)) + ((tail @ form) * tail).sum(-1)
    return own.clamp_min(0)
