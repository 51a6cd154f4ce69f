"""Sums of rows over the examples."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nngeom.core import contract
from nngeom.core.factored import FactoredJacobian, LookupJacobian
from nngeom.core.jacobian import LayerJacobian


@functools.singledispatch
def totals(j: LayerJacobian) -> Tensor:
    """``[k, s, o, i]``: ``sum_n J[k, n]``."""
    k, n, *_ = j.shape
    ones = torch.ones(1, n, dtype=j.dtype, device=j.device)
    return torch.stack([j.cotangents(i, i + 1).vjp(ones) for i in range(k)])


@totals.register
def _(j: FactoredJacobian) -> Tensor:
    return torch.stack([contract.weight_gradient(g, j.a) for g in j.g])


totals.register(LookupJacobian, totals.dispatch(LayerJacobian))
