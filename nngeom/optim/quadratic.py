"""Steps to the minimum of the quadratic model of a batch, along the preconditioned gradient and the last step.

Source: Martens & Grosse 2015, sections 6.4 and 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nngeom.core.damping import FactoredTikhonov, Tikhonov
from nngeom.core.draws import inner_products
from nngeom.core.errors import ArgumentError, UnsupportedError
from nngeom.cotangents.fisher import ExactFisher
from nngeom.optim.arguments import number
from nngeom.optim.gradients import Gradients
from nngeom.pullback.linearization import Linearization
from nngeom.space.pvector import PVector
from nngeom.sweep.observe import Observer

LAST = "last_step"  # what a parameter's state calls where it went


@dataclass(frozen=True)
class QuadraticModel:
    """``g^T d + d^T (F + damping I) d / 2`` of the mean loss, with the exact Fisher matrix ``F`` of the examples whose
    ``outputs()`` the model gives; ``bound``: on the divergence ``d^T (F + damping I) d / 2`` of a step, if there is
    one; ``mean``: of a number, over processes.
    """

    observer: Observer
    outputs: Callable[[], Any]
    damping: float
    bound: float | None
    mean: Callable[[float], float]

    def descend(self, gradients: Gradients, gradient: Tensor, groups: list[dict[str, Any]], state: Any) -> float | None:
        """Move the parameters of ``groups`` to where it is lowest along ``gradients.flat`` and their last step, and say
        how far down that is for the ``gradient [d]``; ``None``, and no step, where it is not finite.
        """
        moved = [p for group in groups for p in group["params"] if p.grad is not None]
        kept = set(moved)
        for p, x in gradients.split(gradients.flat).items():
            if p not in kept:
                x.zero_()
        directions = [gradients.flat]
        if any(LAST in state[p] for p in moved):
            pieces = gradients.split(gradient).items()
            last = [state[p][LAST] if LAST in state[p] else torch.zeros_like(x) for p, x in pieces]
            directions.append(torch.cat([x.flatten() for x in last]).to(gradient.dtype))
        slopes = _products(gradient, directions)
        curvature = self._curvature(directions)
        if not bool(torch.isfinite(curvature).all()):
            return None
        c = lowest(curvature, slopes, self.observer.network.dtype)
        divergence = 0.5 * float(c @ curvature @ c)
        if self.bound is not None and divergence > self.bound:
            c = c * (self.bound / divergence) ** 0.5
        step = float(c[0]) * directions[0]
        for x, d in zip(c[1:].tolist(), directions[1:]):
            step.add_(d, alpha=x)
        places = gradients.split(step)
        steps = [places[p].to(p.dtype) for p in moved]
        torch._foreach_add_(moved, steps)
        for p, x in zip(moved, steps):
            state[p][LAST] = x
        return float(slopes @ c + 0.5 * c @ curvature @ c)

    def _curvature(self, directions: list[Tensor]) -> Tensor:
        """``d_i^T (F + damping I) d_j``, ``[k, k]`` in float64, by one product with the Jacobian each."""
        network = replace(self.observer.network, function=lambda: self.observer.pick(self.outputs()))
        linear, metric = Linearization(network), ExactFisher(self.observer.cotangents.likelihood)  # type: ignore[union-attr]
        tangents, times = [], []
        for d in directions:
            v = PVector(network.collection, d)
            outputs, tangent = linear.jvp((), {name: v[name].to(p.dtype) for name, p in network.parameters.items()})
            tangents.append(tangent.flatten())
            times.append(metric.times(outputs.detach(), tangent, (), 0).flatten() / len(outputs))
        fisher = [[self.mean(x) for x in _products(t, times).tolist()] for t in tangents]
        return torch.tensor(fisher, dtype=torch.float64) + self.damping * torch.stack(
            [_products(d, directions) for d in directions]
        )


def _products(x: Tensor, others: list[Tensor]) -> Tensor:
    """``<x, y>`` with each of ``others``, in float64 on the host."""
    return torch.cat([inner_products(x.unsqueeze(0), y.unsqueeze(0)) for y in others]).double().cpu()


def lowest(curvature: Tensor, slopes: Tensor, dtype: torch.dtype) -> Tensor:
    """Where ``slopes^T c + c^T curvature c / 2`` is lowest; directions that rounding in ``dtype`` cannot tell apart
    share a coefficient.
    """
    size = curvature.diagonal().clamp_min(torch.finfo(curvature.dtype).tiny).rsqrt()
    scaled = torch.linalg.pinv(size[:, None] * curvature * size, rtol=100 * torch.finfo(dtype).eps, hermitian=True)
    return -size * (scaled @ (size * slopes))


def require_quadratic(
    observer: Observer, groups: list[dict[str, Any]], step: int, reduction: str, *, sharded: bool
) -> None:
    """Raise :class:`ArgumentError` where there is no likelihood, weights decay, or the ``reduction`` of the loss is not
    the mean; :class:`UnsupportedError` for a model under ``fully_shard``.
    """
    if reduction != "mean":
        raise ArgumentError(f"reduction is {reduction!r}; expected with step(outputs=) a loss averaged over examples")
    if observer.cotangents is None:
        raise ArgumentError(
            "step(outputs=) takes the Fisher matrix of the batch from the likelihood: expected fisher='monte_carlo' or "
            "'exact' with likelihood=, as for the loss"
        )
    if any(number("weight_decay", group["weight_decay"], step) for group in groups):
        raise ArgumentError(
            "step(outputs=) goes to the minimum of a model of the loss, which decoupled weight decay is no part of: "
            "expected weight_decay=0; add the penalty to the loss"
        )
    if sharded:
        raise UnsupportedError("step(outputs=) is not offered under fully_shard; leave it out, with lr= and momentum=")


def added(damping: Any) -> float:
    """What ``damping`` adds to the matrix; raises :class:`ArgumentError` where that is no number."""
    if not isinstance(damping, (Tikhonov, FactoredTikhonov)):
        raise ArgumentError(
            f"damping is {damping!r}; expected with step(outputs=) a number, FactoredTikhonov or LevenbergMarquardt"
        )
    return float(damping.value)
