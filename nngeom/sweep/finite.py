"""Rows that are not finite, named by layer, batch and examples."""

from __future__ import annotations

import math

import torch

from nngeom.capture.network import Network
from nngeom.core.errors import NonFiniteError
from nngeom.core.jacobian import LayerJacobian
from nngeom.core.layout import Layout


def require_finite_rows(jacobians: dict[Layout, LayerJacobian], network: Network, index: int) -> None:
    """Raise :class:`NonFiniteError` for rows of batch ``index`` that are not finite, naming layer and examples."""
    tensors = {layout: getattr(j, "g", getattr(j, "m", None)) for layout, j in jacobians.items()}
    sums = [t.detach().sum() for t in tensors.values() if t is not None]
    if not sums or all(map(math.isfinite, torch.stack(sums).tolist())):
        return
    for layout, t in tensors.items():
        if t is not None and not bool(torch.isfinite(t).all()):
            bad = (~torch.isfinite(t)).transpose(0, 1).flatten(1).any(1).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"gradients of layer {network.layer_of(layout.names[0])!r} contain NaN or infinity in "
                f"batch {index}, examples {bad[:8]}"
                f"{'...' if len(bad) > 8 else ''}; check those inputs, or use a wider dtype"
            )
