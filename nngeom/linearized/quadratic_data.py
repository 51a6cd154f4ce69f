"""The three data sets on which the quadratic model is solved by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError
from nngeom.core.given_plainly import require_real, require_whole


@dataclass(frozen=True)
class QuadraticData:
    """Inputs ``X (n, d)``, trained targets ``y (n,)`` and which examples are ``typical (n,)``: clean, or of the
    majority.
    """

    X: Tensor
    y: Tensor
    typical: Tensor


def reversed_modes(mu: Tensor) -> QuadraticData:
    """Example 1: ``x_i = sqrt(mu_i) e_i``, ``y_i = mu_{n+1-i} / sqrt(mu_i)``; the two regimes learn in opposite orders.

    ``mu (n,)`` positive and descending. From ``w0 = sqrt(sigma) 1`` the linear rate of mode ``i`` is ``sigma mu_i`` and
    the non-linear one ``2 mu_{n+1-i}``. Source: George 2023, thesis, section 5.4.4.
    """
    if mu.ndim != 1 or not bool((mu > 0).all()) or not bool((mu.diff() < 0).all()):
        raise ArgumentError(f"mu is {mu.tolist()}; expected positive numbers in descending order")
    return QuadraticData(torch.diag(mu.sqrt()), mu.flip(0) / mu.sqrt(), torch.ones(len(mu), dtype=torch.bool))


def label_noise(n: int = 20, flipped: int = 5, eta: float = 2.0, d: int = 200) -> QuadraticData:
    """Example 2: ``x_i = k_i y_i e_1 + eta e_{i+1}``: one common feature, wrong (``k_i = -1``) for the ``flipped``
    examples.

    ``X X^T = (k y)(k y)^T + eta^2 I``. The first mode fits the clean examples and gets the others wrong; the rest of
    the targets is one mode in the eigenspace of ``eta^2``. With ``q`` flipped, the first one is learned first in the
    non-linear regime where ``eta^2 (4 q (n - q) - (n - 2 q)^2) < n (n - 2 q)^2`` (``eta < 3.16`` for 20 and 5). ``d``:
    dimensions, more than ``n``. Labels alternate, the last ``flipped`` examples are the noisy ones. Raises
    :class:`ArgumentError`.
    """
    _require(n, flipped, d, 1)
    require_real(eta, "eta")
    y, k = _labels(n), _signs(n, flipped)
    X = torch.zeros(n, d, dtype=torch.float64)
    X[:, 0] = k * y
    X[torch.arange(n), 1 + torch.arange(n)] = eta
    return QuadraticData(X, y, k > 0)


def spurious_feature(
    n: int = 20, minority: int = 5, strength: float = 0.5, eta: float = 2.0, d: int = 200
) -> QuadraticData:
    """Example 3: ``x_i = k_i y_i e_1 + strength y_i e_2 + eta e_{i+2}``: a spurious feature that fails (``k_i = -1``)
    for a minority, and a core feature that is always right but weaker (``strength <= 1``).

    ``n``: examples, the last ``minority`` of which are against the spurious feature; ``d``: dimensions, at least ``n +
    2``. Raises :class:`ArgumentError`.
    """
    _require(n, minority, d, 2)
    require_real(eta, "eta")
    require_real(strength, "strength")
    y, k = _labels(n), _signs(n, minority)
    X = torch.zeros(n, d, dtype=torch.float64)
    X[:, 0], X[:, 1] = k * y, strength * y
    X[torch.arange(n), 2 + torch.arange(n)] = eta
    return QuadraticData(X, y, k > 0)


def _labels(n: int) -> Tensor:
    return 1.0 - 2.0 * (torch.arange(n, dtype=torch.float64) % 2)


def _signs(n: int, q: int) -> Tensor:
    return torch.where(torch.arange(n) < n - q, 1.0, -1.0).double()


def _require(n: int, q: int, d: int, more: int) -> None:
    for number, what in ((n, "n"), (q, "the number of exceptions"), (d, "d")):
        require_whole(number, what, 0)
    if not 0 <= q <= n or d < n + more:
        raise ArgumentError(f"n={n}, exceptions={q}, d={d}; expected 0 <= exceptions <= n and d >= {n + more}")
