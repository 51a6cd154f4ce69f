"""Rademacher complexity of linear classes of tangent features, and what the best rescaling of their singular values
gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nngeom.analysis.kernel import kernel_tensor, require_symmetric, square_kernel
from nngeom.analysis.labels import require_class_labels, signs
from nngeom.analysis.spectrum import THRESHOLD
from nngeom.core import linalg
from nngeom.core.errors import ArgumentError, ArgumentTypeError, OutputError
from nngeom.core.given_plainly import described, require_at_least, require_real, require_real_tensor, require_whole
from nngeom.solve.hutchinson import Estimate, rademacher

EXACT_LIMIT = 16


def rademacher_bound(K: Any, norm: float | Tensor) -> Tensor:
    """``(M / n) sqrt(tr K)``: bounds the empirical Rademacher complexity of ``{<w, phi> : |w| <= M}`` on ``n`` points.

    ``K``: an FMat, a kernel ``(c, n, c, n)`` or a matrix ``(n, n)``; ``norm`` is ``M``. The complexity is at least
    ``1 / sqrt(2)`` of it. Source: Baratin et al. 2021, eq. 9; Bartlett and Mendelson 2002.
    """
    m, n = square_kernel(K), kernel_tensor(K).shape[1]
    require_at_least(norm, "norm")
    return torch.as_tensor(norm) * m.diagonal().sum().clamp_min(0).sqrt() / require_points(n)


def require_points(n: int) -> int:
    """``n``, at least 1."""
    if n < 1:
        raise ArgumentError("the kernel has no points; expected at least one")
    return n


def rademacher_complexity(
    K: Any, norm: float | Tensor, method: str = "exact", samples: int = 1000, generator: torch.Generator | None = None
) -> Tensor | Estimate:
    """``(M / n) E_s sqrt(s^T K s)`` over random signs: the complexity itself, of a class of scalar functions.

    ``K``: a kernel ``(1, n, 1, n)``; ``norm``: ``M``, the largest norm in the class. ``method="exact"`` sums over all
    signs (at most 16 points); ``"monte_carlo"``, from ``samples`` draws by ``generator`` (torch's global one by
    default), gives an :class:`Estimate` with its standard error (infinite for one sample). No absolute value of the
    correlation is taken (for symmetric classes it would not matter).
    """
    m = require_symmetric(K)
    n = require_points(m.shape[0])
    require_at_least(norm, "norm")
    if kernel_tensor(K).shape[0] != 1:
        raise ArgumentError("the kernel has several outputs; expected one: pass K.tensor[y, :, y] and see margin_bound")
    if method == "exact":
        if n > EXACT_LIMIT:
            raise ArgumentError(
                f"{n} points have 2**{n} sign vectors; expected at most {EXACT_LIMIT}, or method='monte_carlo'"
            )
        codes = torch.arange(2 ** (n - 1), device=m.device)  # s and -s give the same
        drawn = 1 - 2 * ((codes[:, None] >> torch.arange(n, device=m.device)) & 1).to(m)
    elif method == "monte_carlo":
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ArgumentError(f"samples is {described(samples)}; expected a whole number of at least 1")
        drawn = rademacher(samples, n, like=m, generator=generator)
    else:
        raise ArgumentError(f"method is {method!r}; expected 'exact' or 'monte_carlo'")
    roots = ((drawn @ m) * drawn).sum(1).clamp_min(0).sqrt() * norm / n
    if method == "exact":
        return roots.mean()
    error = roots.std() / samples**0.5 if samples > 1 else torch.full_like(roots[0], torch.inf)
    return Estimate(roots.mean(), error)


def flow_bound(norms: Sequence[float] | Tensor, traces: Sequence[float] | Tensor, examples: int) -> Tensor:
    """``sum_t (m_t / n) sqrt(tr K_t)``: the bound for functions reached by steps of norm ``m_t`` with kernels ``K_t``.

    ``norms`` and ``traces``: ``m_t`` and ``tr K_t``, one each a step; ``examples``: ``n``.
    """
    m, k = _not_negative(norms, "norms"), _not_negative(traces, "traces")
    require_whole(examples, "examples")
    if m.shape != k.shape:
        raise ArgumentError(f"got {tuple(m.shape)} norms and {tuple(k.shape)} traces; expected one of each a step")
    return (m * k.sqrt()).sum() / examples


def _not_negative(x: Any, what: str) -> Tensor:
    try:
        t = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(f"{what} are {described(x)}; expected numbers, one a step") from None
    require_real_tensor(t, what)
    t = t.double()
    if bool((t < 0).any()):
        raise ArgumentError(f"{what} go down to {float(t.min()):.3g}; expected numbers of at least 0")
    return t


def margins(outputs: Tensor, targets: Tensor) -> Tensor:
    """``(n,)``: ``f[y] - max_{y' != y} f[y']``, or ``f y`` for one output and labels of -1 and 1 (or 0 and 1).

    ``outputs (n, c)`` or ``(n,)``, class labels ``targets (n,)``. Raises :class:`OutputError` for labels that do not
    fit.
    """
    require_real_tensor(outputs, "outputs")
    if not 1 <= outputs.ndim <= 2:
        raise OutputError(f"outputs have shape {tuple(outputs.shape)}; margins take (n, c), or (n,) for one output")
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        return outputs.flatten() * signs(targets, len(outputs), "a margin").to(outputs)
    labels = require_class_labels(targets, len(outputs), "a margin").to(outputs.device)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < outputs.shape[1]:
        span, c = f"{int(labels.min())} to {int(labels.max())}", outputs.shape[1]
        raise OutputError(f"labels go from {span}; outputs {tuple(outputs.shape)} have classes 0 to {c - 1}")
    own = outputs.gather(1, labels[:, None])
    rest = outputs.scatter(1, labels[:, None], float("-inf"))
    return (own - rest.max(1, keepdim=True).values)[:, 0]


def ramp_loss(margin: Tensor, gamma: float) -> Tensor:
    """1 up to ``margin`` 0, 0 from ``gamma`` on, linear between, for margins of any shape."""
    require_real_tensor(margin, "margin")
    require_at_least(gamma, "gamma, a margin,", above=True)
    return (1 - margin / gamma).clamp(0, 1)


def margin_bound(K: Any, norm: float, gamma: float) -> Tensor:
    """``(c^(3/2) M / (gamma n)) sqrt(tr K)``: the complexity of the ramp loss of a multiclass linear class, ``K (c, n,
    c, n)``.

    ``norm``: ``M``, the largest norm in the class; ``gamma``: the margin from which the loss is 0.
    """
    require_at_least(gamma, "gamma, a margin,", above=True)
    return kernel_tensor(K).shape[0] ** 1.5 / gamma * rademacher_bound(K, norm)


def generalization_bound(
    empirical: float, complexity: float, examples: int, delta: float = 0.05, *, data_dependent: bool = True
) -> float:
    """``emp + 2 R + 3 sqrt(log(2/delta) / 2n)`` with the empirical complexity, or ``emp + 2 R_n + sqrt(log(1/delta) /
    2n)``.

    ``empirical``: the mean loss ``emp`` on ``examples = n``; ``complexity``: ``R``, of these examples
    (``data_dependent``), or its expectation ``R_n``; the bound holds with probability ``1 - delta``.
    """
    require_real(empirical, "empirical")
    require_at_least(complexity, "complexity")
    require_whole(examples, "examples")
    require_real(delta, "delta")
    if not 0 < delta < 1:
        raise ArgumentError(f"delta is {delta}; expected a number in (0, 1)")
    slack = (
        3 * math.sqrt(math.log(2 / delta) / (2 * examples))
        if data_dependent
        else math.sqrt(math.log(1 / delta) / (2 * examples))
    )
    return float(empirical) + 2 * float(complexity) + slack


def interpolation_norm(K: Any, y: Tensor) -> Tensor:
    """``sqrt(y^T K^+ y)``: the norm of the least-norm interpolator."""
    values, coefficients = _modes(K, y)
    return (coefficients.square() / values).sum().sqrt()


def interpolation_bound(K: Any, y: Tensor) -> Tensor:
    """``(1/n) sqrt(sum_j (u_j^T y)^2 / lambda_j * sum_j lambda_j)``: :func:`rademacher_bound` at the least norm that
    fits ``y``.

    ``K``: a kernel ``(c, n, c, n)``; ``y``: labels ``(c, n)`` or an FVector.
    """
    values, coefficients = _modes(K, y)
    return ((coefficients.square() / values).sum() * values.sum()).sqrt() / kernel_tensor(K).shape[1]


def rescaled_bound(K: Any, y: Tensor) -> Tensor:
    """``(1/n) sum_j |u_j^T y|``: :func:`interpolation_bound` after the best rescaling of the singular values of the
    features.

    ``K`` and ``y`` as there. The scales ``nu_j = lambda_j / |u_j^T y|`` (up to a factor) reach it, whatever the
    eigenvalues were; modes of zero eigenvalue are left out. Where eigenvalues coincide their eigenvectors are not
    determined, nor is this number: it is that of the ones returned by ``eigh``. Source: Baratin et al. 2021,
    proposition on the optimal norm.
    """
    _, coefficients = _modes(K, y)
    return coefficients.abs().sum() / kernel_tensor(K).shape[1]


def _modes(K: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Positive eigenvalues and the coefficients ``u_j^T y`` of labels ``(n,)``, ``(c, n)`` or an FVector."""
    m = require_symmetric(K)
    c, n = kernel_tensor(K).shape[:2]
    t = getattr(y, "tensor", y)
    require_real_tensor(t, "y")
    if tuple(t.shape) not in {(c, n), (c * n,), *([(n, 1)] if c == 1 else [])}:
        raise ArgumentError(
            f"y has shape {tuple(t.shape)}; the kernel has {c} outputs of {n} points: expected labels ({c}, {n})"
        )
    flat = t.to(m).flatten()
    values, vectors = linalg.eigh(m)
    keep = values > max(THRESHOLD, len(values) * torch.finfo(values.dtype).eps) * values.abs().max()
    return values[keep], vectors[:, keep].T @ flat
