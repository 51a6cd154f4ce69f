"""Sharpness, non-uniformity, and when stochastic gradient descent can stay at a minimum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.network import leading_size, take
from nngeom.core.errors import ArgumentError, NonFiniteError
from nngeom.core.given_plainly import require_real, require_real_tensor, require_whole
from nngeom.measures.hessian import Hessian
from nngeom.ranks.totals import generator_of, mean
from nngeom.solve.lanczos import lanczos
from nngeom.space.collection import LayerCollection
from nngeom.space.pvector import PVector
from nngeom.sweep.run import Function, Run


def sharpness(
    model: nn.Module,
    loader: Any,
    loss: Any = "cross_entropy",
    *,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
) -> Tensor:
    """The largest eigenvalue of the Hessian of the mean loss, by Lanczos on Hessian-vector products; no matrix is
    formed.

    ``loss``: as for :func:`nngeom.Hessian`. ``tol``: the residual relative to the largest eigenvalue. ``generator``: of
    the starting vector (seeded by default).
    """
    hessian = Hessian(
        model,
        loader,
        loss=loss,
        function=function,
        layer_collection=layer_collection,
        memory_budget=memory_budget,
        process_group=process_group,
    )
    values, _ = hessian.lanczos(1, tol=tol, generator=_seeded(generator))
    require_real_tensor(values, "the spectrum of the Hessian (see the inputs and the model)")
    return values[0]


def non_uniformity(
    model: nn.Module,
    loader: Any,
    loss: Any = "cross_entropy",
    *,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
) -> Tensor:
    """``sqrt(lambda_max(1/n sum_i H_i^2 - H^2))`` of the per-example Hessians ``H_i``, matrix-free.

    Every Lanczos step takes two Hessian-vector products of every example by itself: for probe sets, not whole data
    sets. ``loss``: as for :func:`nngeom.Hessian`; ``tol`` and ``generator`` as for :func:`sharpness`. Source: Wu, Ma
    and E 2018, definition of non-uniformity.
    """
    run = Run.of(model, loader, function=function, layer_collection=layer_collection, process_group=process_group)
    options: dict[str, Any] = {
        "loss": loss,
        "function": function,
        "layer_collection": run.network.collection,
        "memory_budget": memory_budget,
    }
    with run.team.together("examples"):
        run = run.held()
        single = [Hessian(model, [example], **options) for batch in run.loader for example in _examples(batch)]
    whole = Hessian(model, run.loader, process_group=process_group, **options)
    collection = run.network.collection

    def covariance(v: Tensor) -> Tensor:
        x = PVector(collection, v)
        squares = lambda: (sum((h.mv(h.mv(x)).flat() for h in single), torch.zeros_like(v)), len(single))
        return mean(run.team, "squares of Hessians", squares, [v]) - whole.mv(whole.mv(x)).flat()

    drawn = generator_of(run.team, _seeded(generator), run.network.device)
    start = PVector.randn(collection, generator=drawn, dtype=whole.dtype).flat().to(whole.device)
    values, _ = lanczos(covariance, start, 1, tol=tol)
    return values[0].clamp_min(0).sqrt()


@dataclass(frozen=True)
class Stability:
    """Whether stochastic gradient descent can be linearly stable at an interpolating minimum.

    ``stable``: both necessary conditions hold, ``sharpness <= 2 / lr`` and ``non_uniformity <= sqrt(B (n - 1) / (n -
    B)) / lr`` (no bound for full batches), which are ``largest_sharpness`` and ``largest_non_uniformity``.
    """

    stable: bool
    sharpness: float
    non_uniformity: float
    largest_sharpness: float
    largest_non_uniformity: float

    def __bool__(self) -> bool:
        return self.stable


def sgd_stability(a: float | Tensor, s: float | Tensor, lr: float, batch_size: int, n: int) -> Stability:
    """The necessary condition for linear stability from sharpness ``a`` and non-uniformity ``s``; the result is true or
    false.

    ``lr``: the learning rate; ``batch_size``: ``B``, of ``n`` examples.

    Source: Wu, Ma and E 2018, theorem on linear stability.
    """
    _require(lr, batch_size, n)
    largest_a = 2 / lr
    largest_s = math.inf if batch_size == n else math.sqrt(batch_size * (n - 1) / (n - batch_size)) / lr
    require_real(a, "the sharpness", finite=False)
    require_real(s, "the non-uniformity", finite=False)
    a, s = float(a), float(s)
    if math.isnan(a) or math.isnan(s):
        raise NonFiniteError(f"sharpness is {a} and non-uniformity {s}; NaN is neither stable nor unstable")
    if s < 0:
        raise ArgumentError(f"the non-uniformity is {s}; expected a number of at least 0: it is a root")
    return Stability(a <= largest_a and s <= largest_s, a, s, largest_a, largest_s)


def stability_eigenvalue(hessians: Tensor, lr: float, batch_size: int) -> Tensor:
    """``lambda_max((I - lr H)^2 + lr^2 (n - B) / (B (n - 1)) S)``: stable if at most 1 (and only if, in one dimension).

    ``hessians`` ``(n, d, d)``, one an example; ``batch_size`` ``B``; ``H`` their mean and ``S = mean(H_i^2) - H^2``;
    batches drawn without replacement. For least squares at zero residual ``H_i = x_i x_i^T``.
    """
    require_real_tensor(hessians, "hessians")
    if hessians.ndim != 3 or hessians.shape[1] != hessians.shape[2]:
        raise ArgumentError(f"hessians have shape {tuple(hessians.shape)}; expected (n, d, d)")
    if (hessians - hessians.mT).norm() > torch.finfo(hessians.dtype).eps ** 0.5 * hessians.norm():
        raise ArgumentError("hessians are not symmetric; expected second derivatives, (n, d, d)")
    n = len(hessians)
    _require(lr, batch_size, n)
    h = hessians.mean(0)
    s = (hessians @ hessians).mean(0) - h @ h
    step = torch.eye(len(h), dtype=h.dtype, device=h.device) - lr * h
    noise = 0.0 if batch_size == n else lr**2 * (n - batch_size) / (batch_size * (n - 1))
    return torch.linalg.eigvalsh(step @ step + noise * s)[-1]


def _require(lr: float, batch_size: int, n: int) -> None:
    require_real(lr, "lr")
    require_whole(batch_size, "batch_size")
    require_whole(n, "n")
    if lr <= 0 or not 1 <= batch_size <= n:
        raise ArgumentError(
            f"got lr={lr}, batch_size={batch_size}, n={n}; expected a positive rate and 1 <= batch_size <= n"
        )


def _examples(batch: Any) -> list[Any]:
    n = leading_size(batch) or 0
    return [take(batch, slice(i, i + 1), n) if n > 1 else batch for i in range(n)]


def _seeded(generator: torch.Generator | None) -> torch.Generator:
    return generator if generator is not None else torch.Generator().manual_seed(0)
