"""The eigenbases of many Kronecker products: each factor decomposed once, by one of the processes, on a thread of its
own.
"""

from __future__ import annotations

from torch import Tensor

from nngeom.core import linalg
from nngeom.core.layout import Layout
from nngeom.pmat.kronecker import EigenBlock, KroneckerBlock
from nngeom.ranks.made import made
from nngeom.ranks.team import Team

OVERHEAD = 64**3  # of a decomposition, in the units of :func:`cost`: small ones cost calls, not arithmetic


def cost(factor: Tensor) -> float:
    """About proportional to the time that :func:`linalg.factor_eigh` takes."""
    return OVERHEAD + (0 if linalg.is_diagonal(factor) else factor.shape[0] * factor.shape[1] * factor.shape[2] ** 2)


def eigenbases(blocks: dict[Layout, KroneckerBlock], team: Team) -> dict[Layout, EigenBlock]:
    """The same matrices in their eigenbases."""
    factors = {(layout, side): getattr(b, side) for layout, b in blocks.items() for side in "ag"}
    if not factors:
        return {}
    costs = {key: cost(factor) for key, factor in factors.items()}
    device = next(iter(factors.values())).device
    decomposed = lambda key: linalg.factor_eigh(factors[key])
    found = made(team, "eigendecompositions", costs, decomposed, device, threaded=True)
    return {lay: EigenBlock.of_factors(found[lay, "a"], found[lay, "g"], b.dropped) for lay, b in blocks.items()}
