"""Rows over windows, read channel by channel: what is left when the places of a window are taken to be uncorrelated.

Inputs are ``a[n, t, s, (c w)]``, channel ``c`` and place ``w`` in the window, and perhaps the ones of a bias behind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.factored import FactoredJacobian
from nngeom.core.statistic import Moment


def channel_sums(j: FactoredJacobian, window: int, bias: bool, sharing: str, limit: int, first: bool) -> dict[str, Tensor | Moment]:
    """Sums like :meth:`LayerJacobian.kronecker_sums`: ``"c" [s, c, c]`` of inputs, averaged over places, ``"g"``, and ``"b"`` the bias's own."""
    sums: dict[str, Tensor | Moment] = {"g": j.gradient_factor(sharing, limit)}
    if first:
        a = j.a if sharing == "expand" else j.a.mean(1, keepdim=True)
        sums["b"] = a.new_full((a.shape[2], 1, 1), float(a.shape[0] * a.shape[1]))
        rows = _windows(a, window, bias).permute(2, 0, 1, 4, 3).flatten(1, 3)  # [s (n t w) c]
        narrow = rows.shape[-1] <= limit
        sums["c"] = (torch.stack([linalg.gram(r) for r in rows]) if narrow else rows.square().sum(1)) / window
    return sums


def rotate_channels(j: FactoredJacobian, window: int, bias: bool, ua: Tensor | None, ug: Tensor | None) -> FactoredJacobian:
    """Rows in the basis ``ua [s, c, c]`` of every place of the window and ``ug [s, o, o]``; a bias is its own."""
    if ua is None:
        return j.rotate(None, ug)  # type: ignore[return-value]
    a = torch.einsum("ntscw,scd->ntsdw", _windows(j.a, window, bias), ua).flatten(3)
    return FactoredJacobian(torch.cat([a, j.a[..., -1:]], -1) if bias else a, j.rotate(None, ug).g)  # type: ignore[attr-defined]


def _windows(a: Tensor, window: int, bias: bool) -> Tensor:
    return (a[..., :-1] if bias else a).unflatten(-1, (-1, window))
