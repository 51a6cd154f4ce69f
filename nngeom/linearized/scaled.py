"""A knob between feature learning and linear training: the alpha-scaled model."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from nngeom.core.errors import ArgumentError
from nngeom.core.given_plainly import require_at_least
from nngeom.linearized.expansion import Expansion, Refusing, as_outputs


class Scaled(Expansion):
    """``f0(x) + alpha (f(x) - f0(x))``: ``alpha = 1`` is the model, large ``alpha`` approaches :class:`Linearized`.

    ``f0`` is the network at the parameters it had at construction, ``include_f0=False`` drops the added ``f0`` (not the
    subtracted one). Train with the learning rate ``lr / alpha**2`` (:meth:`learning_rate`): then the first step in
    function space is the same for every ``alpha``, the parameters move by ``O(1/alpha)``, and the distance to the
    linearised training is ``O(1/alpha)``. The rule holds for gradient descent with or without momentum.

    ``alpha (f - f0)`` loses ``log10(alpha)`` digits: use float64 from ``alpha = 100`` on. Batch normalisation in
    training mode raises :class:`ModeError`, see :class:`Expansion`. Source: Chizat, Oyallon & Bach 2019; George 2023,
    thesis, eq. 5.2.4 and C.4.
    """

    def __init__(self, model: nn.Module, alpha: float, *, include_f0: bool = True) -> None:
        super().__init__(model)
        _require_positive(alpha)
        self.alpha, self.include_f0 = float(alpha), include_f0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The outputs of the scaled model."""
        f0 = self._at_start(args, kwargs)
        with Refusing():
            f = as_outputs(self.model(*args, **kwargs))
        change = self.alpha * (f - f0)
        return f0 + change if self.include_f0 else change

    def learning_rate(self, lr: float, *, scale_free: bool = False) -> float:
        """:func:`scaled_lr` for this model: from ``lr`` at scale 1, and ``scale_free`` as there."""
        return scaled_lr(lr, self.alpha, scale_free=scale_free)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"alpha={self.alpha:g}, include_f0={self.include_f0}"


def scaled_lr(lr: float, alpha: float, *, scale_free: bool = False) -> float:
    """The learning rate at which an alpha-scaled model takes the function-space steps of ``lr`` at ``alpha = 1``.

    ``lr / alpha**2`` for steps proportional to the gradient (gradient descent, momentum). ``scale_free=True``: ``lr /
    alpha`` for steps that do not depend on its size (Adam and its like; multiply their ``eps`` by ``alpha`` too).
    Raises :class:`ArgumentError` for ``alpha <= 0``. Source: George 2023, thesis, section 5.2.
    """
    _require_positive(alpha)
    require_at_least(lr, "lr")
    return lr / alpha if scale_free else lr / alpha**2


def _require_positive(alpha: float) -> None:
    if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ArgumentError(
            f"alpha is {alpha!r}; expected a finite positive number (1: the model itself, 100: nearly linear)"
        )
