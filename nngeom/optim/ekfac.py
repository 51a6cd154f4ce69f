"""EKFAC and EKFAC-ra as optimizers (George et al. 2018)."""

from __future__ import annotations

from typing import Any

from torch import nn

from nngeom.optim.natural_gradient import NaturalGradient
from nngeom.pmat.ekfac import PMatEKFAC
from nngeom.space.collection import LayerCollection


class EKFAC(NaturalGradient):
    """Natural gradient in the Kronecker-factored eigenbasis, computed anew every ``basis_every`` steps; its spectrum
    follows every step.

    Args:
        damping: the default is the additive form ``s + x + sqrt(x) (s_A + s_B)``, ``FactoredTikhonov(1e-3)``.
        basis_every: steps, or a callable of the step.
        scalings: ``"running"`` (EKFAC-ra): a running average of the squared gradient of the batch in the basis, with
            weight ``scalings_decay`` of the past, starting from KFAC's spectrum at every new basis; costs no more than
            the gradient. ``"batch"``: the second moments of the batch's examples in the basis (Algorithm 1).
            ``"factors"``: KFAC's own spectrum. ``"adam"``: see :class:`SOAP`. Or the name of one of your own
            (:func:`spectrum`).
        refresh: ``"qr"``: later bases of sides above 64 take one step of orthogonal iteration from the last ones;
            ``"eigh"``: they are eigenbases exactly.
        drowned: eigenvalues of a factor below so much of what factored damping adds to it count as their mean, and have
            no eigenvectors of their own; 0: none does.
        block_limit: parameters without Kronecker structure keep an exact block up to so many entries; others go to
            ``rest``.
        sharing: of weights by positions: see :class:`~nngeom.PMatKFAC`.
        sua: whether places of a window count as uncorrelated: see :class:`~nngeom.PMatKFAC`.
        options: further ones of :class:`NaturalGradient`. ``power`` of the damped spectrum divides (1/2: its root).
            ``factors="gradients"`` are of batches, ``G = n V V^T`` and ``A = V^T V / |V|^2``, not of rows.
            ``async_basis=True`` computes the bases in a background thread and goes on with the old ones meanwhile: then
            runs are not reproducible bit by bit.

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
        basis_every: Any = 50,
        statistics_every: Any = 10,
        scalings: str = "running",
        refresh: str = "qr",
        drowned: float = 0.1,
        sharing: str = "expand",
        sua: bool = False,
        block_limit: int = 512,
        **options: Any,
    ):
        super().__init__(
            model,
            PMatEKFAC.options(sharing=sharing, sua=sua, block_limit=block_limit),
            lr=lr,
            momentum=momentum,
            damping=damping,
            weight_decay=weight_decay,
            statistics_decay=statistics_decay,
            kl_clip=kl_clip,
            fisher=fisher,
            likelihood=likelihood,
            layer_collection=layer_collection,
            every=basis_every,
            statistics_every=statistics_every,
            scalings=scalings,
            refresh=refresh,
            drowned=drowned,
            **options,
        )
