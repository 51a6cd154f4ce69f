"""Adam in the eigenbasis of Kronecker factors as an optimizer (Vyas et al. 2024)."""

from __future__ import annotations

from typing import Any

from torch import nn

from nngeom.core.errors import ArgumentTypeError
from nngeom.core.given_plainly import described
from nngeom.optim.natural_gradient import NaturalGradient
from nngeom.pmat.ekfac import PMatEKFAC


class SOAP(NaturalGradient):
    """Adam's moments along the eigenvectors of running Kronecker factors, ``U m / (sqrt(v) + eps)``.

    Args:
        lr: the learning rate, at least 0.
        betas: in [0, 1), the weights of the past in the first moment and in the squares.
        eps: added to the root of the squares.
        factors: whose eigenvectors: of the ``"gradients"`` of batches, as in the paper, or of the ``"rows"`` of
            examples; of every ``statistics_every``-th batch.
        basis_every: steps, or a callable of the step, after which the bases take one step of orthogonal iteration.
        statistics_every: averages of factors take in every so-many-th batch.
        weight_decay: decoupled.
        options: further ones of :class:`NaturalGradient`.

    Steps are not natural gradients, whose length has a model: there is no ``kl_clip``. Errors as for
    :class:`NaturalGradient`. Source: Vyas et al. 2024, Algorithm 3; their one-sided form for long sides is left out.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: Any = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: Any = 0.0,
        *,
        factors: str = "gradients",
        basis_every: Any = 10,
        statistics_every: Any = 5,
        **options: Any,
    ):
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ArgumentTypeError(f"betas is {described(betas)}; expected two numbers in [0, 1)")
        first, second = betas
        super().__init__(
            model,
            PMatEKFAC,
            lr=lr,
            momentum=0.0,
            damping=eps,
            weight_decay=weight_decay,
            kl_clip=None,
            every=basis_every,
            statistics_every=statistics_every,
            scalings="adam",
            scalings_decay=second,
            first_decay=first,
            factors=factors,
            refresh="qr",
            **options,
        )
