"""Damped inverses of blocks, as optimizers keep them."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core.damping import Cutoff, Damping, FactoredTikhonov, Relative
from nngeom.core.errors import SingularError, UnsupportedError
from nngeom.core.layout import Layout
from nngeom.optim.drowned import Drowned, drowned_inverse
from nngeom.optim.manner import Manner
from nngeom.optim.stacks import LARGEST
from nngeom.pmat.block import Block
from nngeom.pmat.damped import damped_by
from nngeom.pmat.kronecker import KroneckerBlock, factored_inverses
from nngeom.ranks.made import made


def inverses(manner: Manner, blocks: dict[Layout, Block], damping: Damping | Relative) -> dict[Layout, Block | Drowned]:
    """Those of all ``blocks``, each made by one of the processes."""
    if manner.makers.size == 1:
        found: dict[Layout, Block | Drowned] = {**small_inverses(blocks, damping)}
        return {lay: found.get(lay) or inverse(lay, block, damping, manner.drowned) for lay, block in blocks.items()}
    costs = {layout: cost(block) for layout, block in blocks.items()}
    tensors = (t for block in blocks.values() for t in block.fields().values() if isinstance(t, Tensor))
    device = next((t.device for t in tensors), torch.device("cpu"))
    made_of = lambda layout: inverse(layout, blocks[layout], damping, manner.drowned)
    return made(manner.makers, "inverses", costs, made_of, device)


def small_inverses(blocks: dict[Layout, Block], damping: Damping | Relative) -> dict[Layout, KroneckerBlock]:
    """Those of small Kronecker products among the ``blocks``, all at once; none where one of them is singular."""
    if not isinstance(damping, FactoredTikhonov):
        return {}
    small = {layout: block for layout, block in blocks.items() if type(block) is KroneckerBlock and _is_small(block)}
    try:
        return dict(zip(small, factored_inverses(list(small.values()), damping)))
    except SingularError:
        return {}


def _is_small(block: KroneckerBlock) -> bool:
    return all(f.ndim == 3 and f.shape[-1] <= LARGEST for f in (block.a, block.g))


def cost(block: Block) -> float:
    """About proportional to the time that an inverse takes."""
    tensors = (t for t in block.fields().values() if isinstance(t, Tensor) and t.ndim > 1)
    return 64**3 + sum(float(t.numel() * t.shape[-1]) for t in tensors)


def inverse(layout: Layout, block: Block, damping: Damping | Relative, drowned: float) -> Block | Drowned:
    """``(block + damping)^-1``, in float64 where float32 finds it singular; ``drowned``: see
    :func:`~nngeom.optim.drowned.drowned_inverse`, 0 where all eigenvalues count.
    """
    led = drowned_inverse(block, damping, drowned) if drowned and isinstance(block, KroneckerBlock) else None
    if led is not None:
        return led
    if isinstance(damping, Relative):
        block, damping = damped_by(block, damping, layout)
    elif isinstance(damping, Cutoff) and damping.top is not None:
        raise UnsupportedError(
            f"damping is {damping!r}, which is for spectra in an eigenbasis; expected nng.optim.EKFAC, or Cutoff(x)"
        )
    try:
        return block.inverse(damping)
    except SingularError:
        if block.diag().dtype != torch.float32:
            raise
        return block.to(torch.float64).inverse(damping).to(torch.float32)
