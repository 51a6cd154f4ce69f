"""SuperNat: gradient descent on a linear model that rescales its features as it goes."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError
from nngeom.core.given_plainly import require_at_least, require_real_tensor


class SuperNat:
    """Gradient descent on ``L = 1/(2n) |Phi w - y|^2`` alternated with the optimal rescaling of the features.

    A step is (1) ``w - lr Phi^T grad_f L``; (2) ``nu_j = kappa / |u_j^T grad_f L|`` in the singular basis of the
    features; (3) features and weights rescaled by ``nu_j^(-1/2)`` and ``nu_j^(1/2)``, so that predictions stay. The
    squared singular values become ``lambda_j |u_j^T grad_f L| / kappa``: directions that are already fitted freeze. The
    singular bases never change, so the state is one prediction coefficient and one squared singular value a direction.

    ``features (n, d)``, ``y (n,)``. ``kappa="max"`` (the largest ``|u_j^T grad_f L|``, so that no direction grows: the
    choice that freezes noise), ``"trace"`` (keeps ``sum_j lambda_j``), or a number; ``None`` never rescales: gradient
    descent. Source: Baratin et al. 2021, section 5; the papers do not say which ``kappa`` they use.
    """

    def __init__(self, features: Tensor, y: Tensor, lr: float, kappa: str | float | None = "max"):
        for name, x in (("features", features), ("y", y)):
            require_real_tensor(x, name)
        require_at_least(lr, "lr")
        if features.ndim != 2 or y.shape != features.shape[:1]:
            raise ArgumentError(
                f"features have shape {tuple(features.shape)} and y {tuple(y.shape)}; expected (n, d) and (n,)"
            )
        if isinstance(kappa, str) and kappa not in ("max", "trace"):
            raise ArgumentError(
                f"kappa is {kappa!r}; expected 'max', 'trace', a positive number, or None for gradient descent"
            )
        if kappa is not None and not isinstance(kappa, str):
            require_at_least(kappa, "kappa", above=True)
        u, s, vh = torch.linalg.svd(features, full_matrices=False)
        keep = s > max(features.shape) * torch.finfo(s.dtype).eps * s.max()
        self.lr, self.kappa, self.targets = lr, kappa, y
        self._u, self._s0, self._vh = u[:, keep], s[keep], vh[keep]
        self._squares = self._s0.square()
        self._coefficients = torch.zeros_like(self._s0)  # of the predictions in the basis u

    @property
    def weights(self) -> Tensor:
        """``(d,)``: the predictor in the original features; predictions are ``features @ weights``."""
        return self._vh.T @ (self._coefficients / self._s0)

    @property
    def singular_values(self) -> Tensor:
        """Singular values of the current features, in the order of the initial ones (descending at first)."""
        return self._squares.sqrt()

    @property
    def predictions(self) -> Tensor:
        """``(n,)``: predictions on the training points."""
        return self._u @ self._coefficients

    @property
    def loss(self) -> Tensor:
        """``1/(2n) |Phi w - y|^2``."""
        return (self.predictions - self.targets).square().mean() / 2

    def step(self) -> Tensor:
        """One step; returns the loss before it."""
        residual = self.predictions - self.targets
        gradient = self._u.T @ residual / len(residual)
        self._coefficients = self._coefficients - self.lr * self._squares * gradient
        if self.kappa is not None:
            size = gradient.abs()
            largest = size.max() if size.numel() else 0.0  # no direction: features that are all zero
            if largest > 0:  # at the optimum nothing is left to rescale by
                named = {"max": largest, "trace": (self._squares * size).sum() / self._squares.sum()}
                kappa = named.get(self.kappa, self.kappa)  # type: ignore[arg-type]
                self._squares = self._squares * size / kappa
        return residual.square().mean() / 2
