"""Parameters that are no distributed tensors, in a model that has some (tensor parallelism): where they are applied to
parts of the activations, each process has the gradient of its own parts alone.
"""

from __future__ import annotations

import torch

from nngeom.capture.in_step import require_same
from nngeom.capture.network import Network
from nngeom.capture.recorder import Capture
from nngeom.capture.remedies import gradients
from nngeom.core.whole import in_parts
from nngeom.pullback.backward import dense


def require_whole_gradients(network: Network, capture: Capture) -> None:
    """Raise :class:`CoverageError` where the gradient of a parameter is not the same on all processes."""
    if network.distributed is None:
        return
    local = {name: p for name, p in capture.leaves.tensors.items() if not in_parts(p)}
    outputs = capture.outputs
    v = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(outputs)
    pulled = gradients(outputs, list(local.values()), v, retain_graph=True) if local else ()
    for name, g in zip(local, map(dense, pulled)):
        if g is not None:
            require_same(g, network.distributed, f"the gradient of {name!r}")
