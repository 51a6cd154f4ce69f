"""What a likelihood has to say about outputs: the square root of their Fisher information, draws, log-probabilities.

A user's own likelihood is one subclass. ``square_root`` (exact Fisher, random probes) and ``sample`` with ``log_prob``
(Monte-Carlo Fisher) are independent: give what you need.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nngeom.core import memory
from nngeom.core.errors import ArgumentError, ArgumentTypeError, OutputError, UnsupportedError
from nngeom.core.given_plainly import described
from nngeom.core.output_metric import DiagonalMetric, OutputMetric
from nngeom.cotangents import logistic
from nngeom.cotangents.precise import Precise
from nngeom.cotangents.reading import Reading
from nngeom.cotangents.softmax import wide
from nngeom.sweep.columns import Columns


class Likelihood(Reading, ABC):
    """``p(y | outputs)`` for outputs ``(n, *shape)``; positions of one example are independent given the outputs."""

    def fit(self, outputs: Tensor, targets: Any = None) -> Likelihood:
        """This likelihood with what it left open (an axis) read off the shapes of ``outputs`` and ``targets``; raises
        :class:`OutputError` where they do not tell.
        """
        return self

    def check(self, outputs: Tensor, targets: Any = None) -> None:
        """Raise :class:`OutputError` where ``outputs (n, *shape)`` do not fit; ``targets``: of the batch, where there
        are some.
        """

    def square_root(self, outputs: Tensor, targets: Any = None) -> Columns | Tensor:
        """Cotangents ``v [k, n, *shape]`` with ``sum_k v_k v_k^T`` the Fisher information of ``outputs (n, *shape)``.

        ``targets``: of the batch, for what they leave out.
        """
        raise UnsupportedError(
            f"{type(self).__name__} defines no square_root; use FIM_MonteCarlo, or define it for the exact Fisher"
        )

    def sample(self, outputs: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
        """Targets drawn from the model with these ``outputs``, ``(n, ...)``; ``uniform(*shape)`` gives numbers in (0,
        1) ``(n, *shape)``, a fresh stream an example.
        """
        raise UnsupportedError(
            f"{type(self).__name__} defines no sample; use FIM, or define it for Monte-Carlo Fisher matrices"
        )

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``log p(targets | outputs)``, ``(n,)``, summed over positions; differentiable in the outputs."""
        raise UnsupportedError(
            f"{type(self).__name__} defines no log_prob; use FIM, or define it for Monte-Carlo Fisher matrices"
        )

    def score(self, outputs: Tensor, labels: Tensor, targets: Any = None) -> Tensor:
        """``d log p(labels | outputs) / d outputs``, ``(n, *shape)``; ``targets``: of the batch, for what they leave
        out.
        """
        with torch.enable_grad(), Precise():
            f = outputs.detach().requires_grad_()
            return torch.autograd.grad(self.log_prob(f, labels).sum(), f)[0]

    def fisher_times(self, outputs: Tensor, tangent: Tensor, targets: Any = None) -> Tensor:
        """The Fisher information of ``outputs`` times ``tangent (n, *shape)``; ``targets``: of the batch, for what they
        leave out.
        """
        columns = as_columns(self.square_root(outputs, targets))
        v = columns.make(0, columns.count)
        inner = (v * tangent).flatten(2).sum(-1)
        return (inner.view(*inner.shape, *[1] * (v.ndim - 2)) * v).sum(0)

    def root_times(self, outputs: Tensor, noise: Callable[..., Tensor], targets: Any = None) -> Tensor:
        """``L r (k, n, *shape)`` for the square root ``L`` of the Fisher information of ``outputs``; ``noise(*size)``
        gives ``r (k, n, *size)``.

        ``targets``: of the batch, for what they leave out.
        """
        return columns_times(as_columns(self.square_root(outputs, targets)), outputs, noise)


def columns_times(columns: Columns, outputs: Tensor, noise: Callable[..., Tensor]) -> Tensor:
    """``sum_j r_j v_j (k, n, *shape)`` over all columns ``v``, as many at once as fit the memory budget."""
    r = noise(columns.count)
    total = outputs.new_zeros(r.shape[0], *outputs.shape)
    for lo, hi in memory.pieces(columns.count, 2 * outputs.numel() * outputs.element_size()):
        total += torch.einsum("knj,jn...->kn...", r[..., lo:hi], columns.make(lo, hi).to(outputs))
    return total


def as_columns(v: Columns | Tensor) -> Columns:
    """Cotangents given as a tensor ``(k, n, *shape)`` or in slices."""
    return Columns(v.shape[0], lambda lo, hi: v[lo:hi]) if isinstance(v, Tensor) else v


def like(targets: Any, outputs: Tensor) -> Tensor:
    """Targets in the shape of the outputs, as exact as they are; raises :class:`OutputError` where there are not as
    many."""
    if not isinstance(targets, Tensor):
        raise OutputError(
            f"targets are {type(targets).__name__}; expected a tensor of the outputs' shape, {tuple(outputs.shape)}"
        )
    if targets.numel() != outputs.numel() or targets.shape[:1] != outputs.shape[:1]:
        raise OutputError(
            f"targets have shape {tuple(targets.shape)}; expected that of the outputs, {tuple(outputs.shape)}"
        )
    return wide(targets.to(outputs.device)).reshape(outputs.shape)


def diagonal_columns(root: Tensor) -> Columns:
    """One cotangent an output: ``root (n, *shape)`` on the diagonal."""
    n, width = root.shape[0], root[0].numel()
    flat = root.reshape(n, width)

    def make(lo: int, hi: int) -> Tensor:
        v = flat.new_zeros(hi - lo, n, width)
        v.diagonal(lo, 0, 2).copy_(flat[:, lo:hi])
        return v.view(hi - lo, *root.shape)

    return Columns(width, make)


class Independent(Likelihood):
    """Outputs whose Fisher information is diagonal: each has a label of its own."""

    def root(self, outputs: Tensor) -> Tensor:
        """The square root of the information of every entry of ``outputs``, ``(n, *shape)``."""
        raise UnsupportedError(f"{type(self).__name__} defines no root")

    def square_root(self, outputs: Tensor, targets: Any = None) -> Columns | Tensor:
        return diagonal_columns(self.root(outputs))

    def metric(self, outputs: Tensor, targets: Any = None) -> OutputMetric | None:
        if type(self).square_root is not Independent.square_root:
            return None
        return DiagonalMetric(self.root(outputs).square().flatten(0, -2))

    def root_times(self, outputs: Tensor, noise: Callable[..., Tensor], targets: Any = None) -> Tensor:
        return self.root(outputs) * noise(*outputs.shape[1:])

    def fisher_times(self, outputs: Tensor, tangent: Tensor, targets: Any = None) -> Tensor:
        return self.root(outputs).square() * tangent


class Bernoulli(Independent):
    """Independent binary labels; outputs are logits ``(n, *shape)``."""

    def root(self, outputs: Tensor) -> Tensor:
        return (outputs.sigmoid() * torch.sigmoid(-outputs)).sqrt()

    def sample(self, outputs: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
        return (uniform(*outputs.shape[1:]) < wide(outputs).sigmoid()).to(outputs.dtype)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -logistic.binary_cross_entropy(wide(outputs), like(targets, outputs)).flatten(1).sum(1).to(outputs.dtype)

    def score(self, outputs: Tensor, labels: Tensor, targets: Any = None) -> Tensor:
        return -logistic.slope(wide(outputs), like(labels, outputs)).to(outputs.dtype)


class Gaussian(Independent):
    """Normal targets around the outputs, with a fixed ``variance``: a number, or one an output (broadcast to
    ``shape``).
    """

    def __init__(self, variance: float | Tensor = 1.0) -> None:
        try:
            self.variance = torch.as_tensor(variance, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentTypeError(f"variance is {described(variance)}; expected positive numbers") from None
        if not bool((self.variance > 0).all()) or not bool(torch.isfinite(self.variance).all()):
            raise ArgumentError(f"variance is {variance}; expected positive finite numbers")

    def _deviation(self, outputs: Tensor) -> Tensor:
        try:
            return self.variance.to(outputs).sqrt().expand(outputs.shape)
        except RuntimeError:
            raise OutputError(
                f"the variance has shape {tuple(self.variance.shape)}; it does not broadcast to outputs "
                f"{tuple(outputs.shape)}"
            ) from None

    def root(self, outputs: Tensor) -> Tensor:
        return 1 / self._deviation(outputs)

    def sample(self, outputs: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
        shape = outputs.shape[1:]
        radius = (-2 * uniform(*shape).log()).sqrt()
        return outputs + self._deviation(outputs) * (radius * torch.cos(2 * torch.pi * uniform(*shape))).to(outputs)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f = wide(outputs)
        deviation = self._deviation(f)
        z = (like(targets, outputs) - f) / deviation
        return (
            (-0.5 * z.square() - deviation.log() - 0.5 * torch.log(z.new_tensor(2 * torch.pi)))
            .flatten(1)
            .sum(1)
            .to(outputs.dtype)
        )

    def score(self, outputs: Tensor, labels: Tensor, targets: Any = None) -> Tensor:
        f = wide(outputs)
        return ((like(labels, outputs) - f) / self._deviation(f).square()).to(outputs.dtype)


class Poisson(Independent):
    """Counts; outputs are log-rates ``(n, *shape)``."""

    def root(self, outputs: Tensor) -> Tensor:
        return (0.5 * outputs).exp()

    def sample(self, outputs: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
        from scipy.stats import poisson

        u, rate = uniform(*outputs.shape[1:]).double().cpu().numpy(), outputs.double().exp().cpu().numpy()
        return torch.as_tensor(poisson.ppf(u, rate)).to(outputs)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f, y = wide(outputs), like(targets, outputs)
        return (y * f - f.exp() - torch.lgamma(y + 1)).flatten(1).sum(1).to(outputs.dtype)

    def score(self, outputs: Tensor, labels: Tensor, targets: Any = None) -> Tensor:
        return (like(labels, outputs) - wide(outputs).exp()).to(outputs.dtype)
