"""Rows over windows, read channel by channel: what is left when the places of a window are taken to be uncorrelated.

Inputs are ``a[n, t, s, (c w)]``, channel ``c`` and place ``w`` in the window, and perhaps the ones of a bias behind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.factored import FactoredJacobian
from nngeom.core.statistic import Inputs, Moment


def channel_sums(
    j: FactoredJacobian, window: int, bias: bool, sharing: str, limit: int
) -> dict[str, Tensor | Moment | Inputs]:
    """Sums like :meth:`LayerJacobian.kronecker_sums`: ``"c" [s, c, c]`` of inputs, averaged over places, ``"g"``, and
    ``"b"`` the bias's own.
    """
    n, t, s, _ = j.a.shape
    ones = j.a.new_full((s, 1, 1), float(n * t if sharing == "expand" else n))
    channels = Inputs(lambda: _channels(j.a, window, bias, sharing, limit))
    return {"g": j.gradient_factor(sharing, limit), "b": Inputs(ones), "c": channels}


def _channels(a: Tensor, window: int, bias: bool, sharing: str, limit: int) -> Tensor:
    a = a if sharing == "expand" else a.mean(1, keepdim=True)
    rows = _windows(a, window, bias).permute(2, 0, 1, 4, 3).flatten(1, 3)  # [s (n t w) c]
    narrow = rows.shape[-1] <= limit
    return (torch.stack([linalg.gram(r) for r in rows]) if narrow else rows.square().sum(1)) / window


def rotate_channels(
    j: FactoredJacobian, window: int, bias: bool, ua: Tensor | None, ug: Tensor | None
) -> FactoredJacobian:
    """Rows in the basis ``ua [s, c, c]`` of every place of the window and ``ug [s, o, o]``; a bias is its own."""
    if ua is None:
        return j.rotate(None, ug)  # type: ignore[return-value]
    a = torch.einsum("ntscw,scd->ntsdw", _windows(j.a, window, bias), ua).flatten(3)
    return FactoredJacobian(torch.cat([a, j.a[..., -1:]], -1) if bias else a, j.rotate(None, ug).g)  # type: ignore[attr-defined]


def _windows(a: Tensor, window: int, bias: bool) -> Tensor:
    return (a[..., :-1] if bias else a).unflatten(-1, (-1, window))
