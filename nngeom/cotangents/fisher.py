"""Fisher metrics: the expectation over labels in closed form, or by draws of a stream keyed by example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.stream import RUNNING, Numbers, Stream
from nngeom.cotangents.categorical import Categorical
from nngeom.cotangents.causal import CausalLM, by_name
from nngeom.cotangents.likelihood import Bernoulli, Gaussian, Likelihood, Poisson, as_columns
from nngeom.sweep.columns import Columns

_NAMES: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "poisson": Poisson,
}


def as_likelihood(likelihood: Any, model: nn.Module | None = None) -> Likelihood:
    """A likelihood by name, class or instance.

    ``model``: whose outputs it is of; ``"categorical"`` of a causal language model is that of the next token
    (:class:`CausalLM`). Raises :class:`ArgumentError` or :class:`ArgumentTypeError` for anything else.
    """
    if isinstance(likelihood, type) and issubclass(likelihood, Likelihood):
        return likelihood()
    if isinstance(likelihood, CausalLM) and likelihood.reduction == "mean":
        raise ArgumentError(
            "CausalLM(reduction='mean') is no likelihood: the log-likelihood of a sequence is the sum over its "
            "positions; "
            "use reduction='sum', or GGN with the loss"
        )
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in _NAMES:
        return by_name(_NAMES[likelihood](), model)
    kind = ArgumentError if isinstance(likelihood, str) else ArgumentTypeError
    raise kind(f"likelihood is {likelihood!r}; expected one of {sorted(_NAMES)} or an instance of a Likelihood")


def fitted(likelihood: Likelihood, outputs: Tensor, batch: Any) -> tuple[Likelihood, Any]:
    """The likelihood fitted to outputs of a batch, which it was checked to fit, and the targets there are."""
    likelihood = likelihood.resolved(outputs, batch)
    y = likelihood.targets_of(outputs, batch)
    likelihood = likelihood.fit(outputs, y)
    likelihood.check(outputs, y)
    return likelihood, y


@dataclass(frozen=True)
class ExactFisher:
    """``E_y[s s^T]`` in closed form: the square root of the Fisher information of the outputs."""

    likelihood: Likelihood

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """One column of the square root a cotangent."""
        likelihood, y = fitted(self.likelihood, outputs, batch)
        return as_columns(likelihood.square_root(outputs, y))

    def times(self, outputs: Tensor, tangent: Tensor, batch: Any, start: int) -> Tensor:
        """The metric of the outputs times a tangent."""
        likelihood, y = fitted(self.likelihood, outputs, batch)
        return likelihood.fisher_times(outputs, tangent, y)

    def root_times(self, outputs: Tensor, noise: Callable[..., Tensor], batch: Any) -> Tensor:
        """The square root of the metric times noise ``(k, n, *shape)``."""
        likelihood, y = fitted(self.likelihood, outputs, batch)
        return likelihood.root_times(outputs, noise, y)


@dataclass(frozen=True)
class MonteCarloFisher:
    """``samples`` labels an example drawn from the model, keyed by (seed, number of the example, sample)."""

    likelihood: Likelihood
    samples: int
    seed: int
    numbers: Numbers = RUNNING

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """One score a sample, divided by ``sqrt(samples)``."""
        likelihood, y = fitted(self.likelihood, outputs, batch)
        numbers = self.numbers.of(batch, start, outputs.shape[0])

        def make(lo: int, hi: int) -> Tensor:
            streams = [Stream(self.seed, numbers, j, outputs.device) for j in range(lo, hi)]
            scores = [likelihood.score(outputs, likelihood.sample(outputs, stream), y) for stream in streams]
            return torch.stack(scores) / self.samples**0.5

        return Columns(self.samples, make)
