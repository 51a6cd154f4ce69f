"""The logistic function and its logarithm, whose derivatives by autograd do not cancel, entry by entry.

``sigma(z) (1 - sigma(z))`` is zero in float32 from ``z = 17`` on; of ``a = exp(-|z|)`` nothing but sums and products
is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sigmoid(z: Tensor) -> Tensor:
    """``1 / (1 + exp(-z))``."""
    a = _small(z)
    return torch.where(z >= 0, torch.ones_like(a), a) / (1 + a)


def softplus(z: Tensor) -> Tensor:
    """``log(1 + exp(z)) = max(z, 0) + log(1 + exp(-|z|))``."""
    return torch.where(z >= 0, z, torch.zeros_like(z)) + _small(z).log1p()


def log_add_exp(x: Tensor, y: Tensor) -> Tensor:
    """``log(exp(x) + exp(y))``."""
    x, y = torch.broadcast_tensors(x, y)
    most, least = torch.where(x >= y, x, y), torch.where(x >= y, y, x)
    return most + (least - most).exp().log1p()


def binary_cross_entropy(z: Tensor, y: Tensor, pos_weight: Tensor | float = 1.0) -> Tensor:
    """``-(w y log sigma(z) + (1 - y) log sigma(-z))``."""
    return (1 - y) * softplus(z) + pos_weight * y * softplus(-z)


def slope(z: Tensor, y: Tensor, pos_weight: Tensor | float = 1.0) -> Tensor:
    """Its derivative ``(1 - y) sigma(z) - w y sigma(-z)``: small for a label that is fitted, never ``sigma(z) - y``."""
    return (1 - y) * sigmoid(z) - pos_weight * y * sigmoid(-z)


def curvature(z: Tensor, y: Tensor, pos_weight: Tensor | float = 1.0) -> Tensor:
    """Its second derivative ``((1 - y) + w y) sigma(z) sigma(-z)``."""
    return ((1 - y) + pos_weight * y) * z.sigmoid() * (-z).sigmoid()


def _small(z: Tensor) -> Tensor:
    """``exp(-|z|)``, with a derivative at zero as well."""
    return torch.where(z >= 0, -z, z).exp()
