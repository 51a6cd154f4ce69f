"""KFAC as an optimizer (Martens & Grosse 2015; Grosse & Martens 2016 for convolutions)."""

from __future__ import annotations

from typing import Any

from torch import nn

from nngeom.core.damping import FactoredTikhonov
from nngeom.optim.natural_gradient import NaturalGradient
from nngeom.pmat.kfac import PMatKFAC
from nngeom.space.collection import LayerCollection


class KFAC(NaturalGradient):
    """Natural gradient with a Kronecker product a layer; its inverse is computed anew every ``inverse_every`` steps.

    Args:
        damping: a number is exact, ``(A (x) G + damping I)^-1`` by eigendecomposition; ``FactoredTikhonov(x)`` damps
            the factors and takes two Cholesky factorisations. The default, ``FactoredTikhonov(1e-2, balanced=False)``,
            is that of George et al. 2018 (A.4); ``balanced=True`` that of Martens & Grosse 2015. A new damping takes
            effect at the next inversion.
        inverse_every: steps, or a callable of the step.
        sharing: of weights by positions: see :class:`~nngeom.PMatKFAC`.
        sua: whether places of a window count as uncorrelated: see :class:`~nngeom.PMatKFAC`.
        block_limit: parameters without Kronecker structure keep an exact block up to so many entries; others go to
            ``rest``.
        drowned: of factors of sides above 64, eigenvalues below so much of what factored damping adds count as their
            mean where the others are few (an eighth of the side): inverses and products are cheaper then; 0: none does.
        options: further ones of :class:`NaturalGradient`.

    ``lr``, ``momentum``, ``weight_decay``, ``statistics_decay``, ``kl_clip``, ``fisher``, ``likelihood``,
    ``statistics_every`` and errors as for :class:`NaturalGradient`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: Any = 0.03,
        momentum: Any = 0.9,
        damping: Any = None,
        weight_decay: Any = 0.0,
        statistics_decay: Any = 0.95,
        kl_clip: Any = 1e-4,
        fisher: str = "empirical",
        likelihood: Any = None,
        layer_collection: LayerCollection | None = None,
        *,
        inverse_every: Any = 10,
        statistics_every: Any = 10,
        sharing: str = "expand",
        sua: bool = False,
        block_limit: int = 512,
        drowned: float = 0.1,
        **options: Any,
    ):
        damping = FactoredTikhonov(1e-2, balanced=False) if damping is None else damping
        super().__init__(
            model,
            PMatKFAC.options(sharing=sharing, sua=sua, block_limit=block_limit),
            lr=lr,
            momentum=momentum,
            damping=damping,
            weight_decay=weight_decay,
            statistics_decay=statistics_decay,
            kl_clip=kl_clip,
            fisher=fisher,
            likelihood=likelihood,
            layer_collection=layer_collection,
            every=inverse_every,
            statistics_every=statistics_every,
            drowned=drowned,
            **options,
        )
