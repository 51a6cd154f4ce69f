"""Two-layer quadratic regression, ``f = X theta`` with ``theta = 1/2 w^2`` in the singular basis of ``X``: closed
forms.

``X = U diag(sqrt(mu)) V^T``, with signs such that ``y_k = u_k^T y >= 0``; ``theta = sum_k 1/2 w_k^2 v_k``; the loss is
``1/2 |X theta - y|^2`` (a sum) and ``w`` follows its gradient flow. Modes do not interact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError
from nngeom.core.given_plainly import require_real, require_real_tensor


@dataclass(frozen=True)
class Modes:
    """The singular basis of a data set: ``mu (d,)`` squared singular values, descending (zeros in the null space),
    ``target (d,) = u^T y >= 0``, ``directions (d, d)`` with the ``v`` as columns."""

    mu: Tensor
    target: Tensor
    directions: Tensor

    @property
    def limit(self) -> Tensor:
        """``theta* = y / sqrt(mu)``, what gradient flow converges to; NaN in the null space, where nothing moves."""
        return torch.where(self.mu > 0, self.target / self.mu.sqrt(), torch.nan)

    def predict(self, X: Tensor, theta: Tensor) -> Tensor:
        """Predictions ``(..., n)`` on inputs ``X (n, d)`` of ``theta (..., d)`` in the singular basis."""
        return theta @ (X @ self.directions).T


def singular_modes(X: Tensor, y: Tensor) -> Modes:
    """The singular basis of ``X (n, d)`` with signs such that ``u^T y >= 0``.

    Where singular values coincide the basis is chosen, not found by chance: ``y`` has a component along the first
    vector of the eigenspace only, and the others follow by Gram-Schmidt from the coordinate axes. Decomposed in
    float64, in the dtype of ``X``. Raises :class:`ArgumentError` for shapes that do not fit. Source: George 2023,
    thesis, section 5.4.
    """
    X, y = _numbers(X, "X"), _numbers(y, "y")
    modes, dtype = _modes(X, y), _dtype(X)
    return Modes(modes.mu.to(dtype), modes.target.to(dtype), modes.directions.to(dtype))


def _modes(X: Tensor, y: Tensor) -> Modes:
    """In float64: what is null in exact numbers is told from what is small."""
    if X.ndim != 2 or y.shape != X.shape[:1] or not X.numel():
        raise ArgumentError(f"X has shape {tuple(X.shape)} and y {tuple(y.shape)}; expected (n, d) and (n,)")
    X, y = X.double(), y.double()
    s, v = torch.linalg.svd(X, full_matrices=True)[1:]
    d = X.shape[1]
    v = v.T.contiguous()
    s = torch.cat([s, s.new_zeros(d - len(s))])
    s = torch.where(s > 1e-10 * s[0].clamp_min(1e-300), s, 0.0)
    lo = 0
    while lo < d and s[lo] > 0:
        hi = lo + 1
        while hi < d and s[hi] > s[lo] * (1 - 1e-7):
            hi += 1
        v[:, lo:hi] = _canonical(v[:, lo:hi], X.T @ y)
        lo = hi
    target = (X @ v).T @ y / torch.where(s > 0, s, 1.0)
    target = torch.where((s > 0) & (target.abs() > 1e-12 * y.norm()), target, 0.0)  # rounding must not choose signs
    sign = torch.where(target < 0, -1.0, 1.0).to(v)
    return Modes(s**2, target * sign, v * sign)


def _canonical(v: Tensor, pull: Tensor) -> Tensor:
    """An orthonormal basis of the span of ``v``: first along the projection of ``pull``, then from the coordinate
    axes.
    """
    if v.shape[1] == 1:
        return v
    inside = v.T @ pull
    first = [v @ (inside / inside.norm())] if inside.norm() > 1e-12 * pull.norm().clamp_min(1e-300) else []
    basis: list[Tensor] = []
    for candidate in [*first, *(v @ v.T)]:
        rest = candidate.clone()
        for _ in range(2):  # twice is enough
            for b in basis:
                rest = rest - (b @ rest) * b
        if rest.norm() > 1e-6:
            basis.append(rest / rest.norm())
        if len(basis) == v.shape[1]:
            break
    return torch.stack(basis, 1)


def quadratic_modes(X: Tensor, y: Tensor, w0: Tensor, times: Tensor, regime: str = "linear") -> Tensor:
    """``theta(t)`` in the singular basis of ``X``, ``(times, d)``, under gradient flow from ``w0 (d,)``.

    ``X (n, d)``: inputs; ``y (n,)``: targets; ``times``: of the trajectory, at least 0. ``w0`` is in that basis too
    (:func:`singular_modes`: singular values descending, ``u^T y >= 0``). ``regime="nonlinear"``: ``theta = 1/2 w^2``,
    logistic growth with rate ``2 sqrt(mu) u^T y``, so modes are learned one after the other. ``"linear"``: ``theta = w
    w0 - 1/2 w0^2``, exponential approach with rate ``2 mu theta0``. Null directions stay.

    Raises :class:`ArgumentError`. Source: George 2023, thesis, Proposition 5.4.1 and eq. 5.4.6, with the exponent of
    the linear regime as its own dynamics give it.
    """
    _require_regime(regime)
    X, w0, modes = _problem(X, y, w0)
    t = _times(times).reshape(-1, 1)
    theta0, mu = 0.5 * w0**2, modes.mu
    if regime == "nonlinear":
        z = 2 * mu.sqrt() * modes.target * t
        growth = torch.where(z > 0, -torch.expm1(-z) / torch.where(z > 0, z, 1.0), 1.0)
        theta = torch.where(theta0 > 0, theta0 / (torch.exp(-z) + 2 * mu * theta0 * t * growth), 0.0)
    else:
        limit = torch.where(mu > 0, modes.limit, theta0)
        theta = limit + torch.exp(-2 * mu * theta0 * t) * (theta0 - limit)
    return theta.to(_dtype(X))


def _problem(X: Any, y: Any, w0: Any) -> tuple[Tensor, Tensor, Modes]:
    """``X``, ``w0 (d,)`` in float64 and the modes; raises :class:`ArgumentError` where they do not fit."""
    X, y, w0 = (_numbers(a, name) for a, name in ((X, "X"), (y, "y"), (w0, "w0")))
    modes = _modes(X, y)
    if w0.shape != modes.mu.shape:
        raise ArgumentError(
            f"w0 has shape {tuple(w0.shape)}; expected ({len(modes.mu)},), one number a singular direction of X"
        )
    return X, w0.to(modes.mu), modes


def _times(times: Any) -> Tensor:
    t = _numbers(times, "times").double().reshape(-1)
    if not t.numel() or bool((t < 0).any()):
        raise ArgumentError(f"times are {t.tolist()[:8]}; expected numbers of at least 0: the flow begins at 0")
    return t


def _dtype(X: Tensor) -> torch.dtype:
    return X.dtype if X.is_floating_point() else torch.get_default_dtype()


def _numbers(x: Any, what: str) -> Tensor:
    try:
        given = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        given = x
    require_real_tensor(given, what)
    return given


def gradient_flow(X: Tensor, y: Tensor, w0: Tensor, times: Tensor, regime: str = "linear") -> Tensor:
    """The same ``(times, d)`` by integrating the gradient of the loss in ``w`` numerically: a check of the closed
    forms.

    ``X``, ``y``, ``w0``, ``times`` and ``regime`` as for :func:`quadratic_modes`. The gradient is taken by autograd
    through the model in data space, in float64; explicit Runge-Kutta of order 8 to 1e-11.
    """
    from scipy.integrate import solve_ivp

    _require_regime(regime)
    X, w0, modes = _problem(X, y, w0)
    w0 = w0.detach()
    inputs, y = (X.double() @ modes.directions).detach(), _numbers(y, "y").double().detach()

    def theta(w: Tensor) -> Tensor:
        return 0.5 * w**2 if regime == "nonlinear" else w * w0 - 0.5 * w0**2

    def velocity(_, w):
        w = torch.as_tensor(w).requires_grad_()
        loss = 0.5 * (inputs @ theta(w) - y).square().sum()
        return -torch.autograd.grad(loss, w)[0].numpy()

    t, back = _times(times).unique(return_inverse=True)
    solution = solve_ivp(velocity, (0.0, float(t[-1])), w0.numpy(), "DOP853", t_eval=t.numpy(), rtol=1e-11, atol=1e-13)
    return theta(torch.as_tensor(solution.y.T)[back]).to(_dtype(X))


def convergence_times(X: Tensor, y: Tensor, w0: Tensor, tolerance: float, regime: str = "linear") -> Tensor:
    """When each mode comes within ``tolerance`` of its limit, ``(d,)``; 0 where it starts there, infinity where it
    never does.

    ``X``, ``y``, ``w0`` and ``regime`` as for :func:`quadratic_modes`. Exact: ``log[(theta* - theta0)(theta* - e) / (e
    theta0)] / (2 sqrt(mu) u^T y)`` in the non-linear regime, ``log[(theta* - theta0) / e] / (2 mu theta0)`` in the
    linear one, for modes that grow. Null directions: 0. Source: George 2023, thesis, section 5.4.3, repaired.
    """
    _require_regime(regime)
    require_real(tolerance, "tolerance")
    if not tolerance > 0:
        raise ArgumentError(f"tolerance is {tolerance!r}; expected a positive distance to the limit")
    X, w0, modes = _problem(X, y, w0)
    theta0, mu = 0.5 * w0**2, modes.mu
    limit = torch.where(mu > 0, modes.limit, theta0)
    gap = (theta0 - limit).abs()
    if regime == "linear":
        t = torch.log(gap / tolerance) / (2 * mu * theta0)
    else:
        end = limit + (theta0 - limit).sign() * tolerance
        rate = 2 * mu.sqrt() * modes.target
        to_zero = (1 / end - 1 / theta0) / (2 * mu)  # where the limit is 0: theta0 / (1 + 2 mu theta0 t)
        t = torch.where(rate > 0, torch.log((theta0 - limit) * end / (theta0 * (end - limit))) / rate, to_zero)
    return torch.where(gap <= tolerance, 0.0, torch.where(theta0 > 0, t, torch.inf)).to(_dtype(X))


def _require_regime(regime: str) -> None:
    if regime not in ("linear", "nonlinear"):
        raise ArgumentError(f"regime is {regime!r}; expected 'linear' or 'nonlinear'")
