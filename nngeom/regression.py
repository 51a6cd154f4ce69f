"""Predictions of kernels, and of a linearised network trained by gradient flow, in closed form."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from nngeom.core.damping import Damping
from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.given_plainly import require_real_tensor
from nngeom.fmat.fmat import FMat
from nngeom.fmat.operator import FunctionOperator
from nngeom.space.fvector import FVector

F = TypeVar("F", FVector, Tensor)


def kernel_regression(
    K_train: FunctionOperator, y: F, K_test_train: FunctionOperator, damping: float | Damping = 0.0
) -> F:
    """Kernel ridge regression, ``K_test_train (K_train + damping I)^-1 y``: ``(*batch, c, n_test)``.

    ``y (*batch, c, n_train)``: targets, an :class:`FVector` or a tensor, as the result is then; for a network at
    initialisation ``y - f_0``, to which ``f_0`` at the test points is added afterwards. With the tangent kernel this is
    the minimum-norm (``damping=0``) or ridge solution of the linearised network. Raises :class:`ArgumentError` on
    kernels that do not fit, :class:`SingularError` on too little damping. Source: Jacot et al. 2018, section 5; Lee et
    al. 2019, eq. 16.
    """
    _require_pair(K_train, K_test_train)
    return _like(y, K_test_train.mv(_solver(K_train).solve(_function(y, "y"), damping)))


def gradient_flow_mse(
    K_train: FMat,
    y: F,
    time: float,
    f0: FVector | Tensor | None = None,
    K_test_train: FunctionOperator | None = None,
    f0_test: FVector | Tensor | None = None,
) -> F:
    """Outputs at ``time`` of the linearised network trained by gradient flow on ``0.5 |f - y|**2`` (summed, not
    averaged).

    ``f_t = y + exp(-t K) (f_0 - y)`` on the training points, of kernel ``K_train``; with ``K_test_train`` on the test
    points ``f_t(x) = f_0(x) - K(x) K^-1 (I - exp(-t K)) (f_0 - y)``, which stays right where ``K`` is singular.
    ``time`` is learning rate times steps, or ``math.inf`` for the end of training; for a mean over ``n`` targets divide
    it by ``n``. ``y (*batch, c, n)``: targets, an :class:`FVector` or a tensor, as the result is then. ``f0``,
    ``f0_test``: outputs at the start (0 when not given). Source: Lee et al. 2019, eqs. 10-11.
    """
    if not isinstance(K_train, FMat):
        raise ArgumentTypeError(
            f"the kernel is {type(K_train).__name__}; expected one that holds its entries, such as FMatDense"
        )
    if not isinstance(time, (int, float)) or math.isnan(time) or time < 0:
        raise ArgumentError(f"time is {time!r}; expected a number >= 0 or math.inf")
    if f0_test is not None and K_test_train is None:
        raise ArgumentError("f0_test is given without K_test_train; expected both: outputs at the start on test points")
    target = FVector(K_train.operand(_function(y, "y"), K_train.columns))
    start = -target if f0 is None else FVector(K_train.operand(_function(f0, "f0"), K_train.columns)) - target
    values, u = K_train.eigh()
    floor = len(values) * torch.finfo(values.dtype).eps * values.abs().amax() if len(values) else values.sum()
    values = torch.where(values.abs() <= floor, torch.zeros_like(values), values)
    error = start.flat() @ u  # [*b, modes]
    if K_test_train is None:
        decay = torch.exp(-time * values) if math.isfinite(time) else (values == 0).to(values)
        return _like(y, target + FVector(((error * decay) @ u.T).unflatten(-1, target.shape[-2:])))
    _require_pair(K_train, K_test_train)
    learned = FVector(((error * _integral(values, time)) @ u.T).unflatten(-1, target.shape[-2:]))
    change = K_test_train.mv(learned)
    return _like(y, -change if f0_test is None else _function(f0_test, "f0_test") - change)


def _function(y: FVector | Tensor, what: str) -> FVector:
    f = FVector(y) if isinstance(y, Tensor) else y
    if isinstance(f, FVector):
        require_real_tensor(f.tensor, what)
    return f


def _like(y: F, out: FVector) -> F:
    """A result of the type that the targets have."""
    return out.tensor if isinstance(y, Tensor) else out


def _integral(values: Tensor, time: float) -> Tensor:
    """``(1 - exp(-t x)) / x``, which is ``t`` at 0; modes of eigenvalue 0 are never seen by a kernel of the same
    features.
    """
    zero = values == 0
    safe = torch.where(zero, torch.ones_like(values), values)
    decayed = -torch.expm1(-time * safe) if math.isfinite(time) else torch.ones_like(safe)
    return torch.where(zero, torch.full_like(values, time if math.isfinite(time) else 0.0), decayed / safe)


def _require_pair(K_train: Any, K_test_train: Any) -> None:
    for name, K in (("K_train", K_train), ("K_test_train", K_test_train)):
        if not isinstance(K, FunctionOperator):
            raise ArgumentTypeError(
                f"{name} is {type(K).__name__}; expected a kernel (GramMatrix(model, test, other=train) for the second)"
            )
    if (K_test_train.outputs, K_test_train.columns) != (
        K_train.outputs,
        K_train.rows,
    ) or K_train.rows != K_train.columns:
        raise ArgumentError(
            f"K_train is {K_train!r} and K_test_train {K_test_train!r}; expected (n, n) and (n_test, n) examples "
            "with the same outputs: "
            "GramMatrix(model, test, other=train)"
        )


def _solver(K: Any) -> Any:
    if not hasattr(K, "solve"):
        raise ArgumentTypeError(f"{type(K).__name__} has no solve; expected an FMat")
    return K
