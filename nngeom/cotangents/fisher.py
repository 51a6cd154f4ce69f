"""Fisher metrics: the expectation over labels in closed form, or by draws of a stream keyed by example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.output_metric import OutputMetric
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

    def metric(self, outputs: Tensor, batch: Any) -> OutputMetric | None:
        """The metric without its root, along the last axis of the outputs, where it is known."""
        likelihood, y = fitted(self.likelihood, outputs, batch)
        return likelihood.metric(outputs, y)

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
    """``samples`` labels an example drawn from the model, keyed by (seed, running index of the example, sample)."""

    likelihood: Likelihood
    samples: int
    seed: int

    def columns(self, outputs: Tensor, batch: Any, start: int) -> Columns:
        """One score a sample, divided by ``sqrt(samples)``."""
        likelihood, y = fitted(self.likelihood, outputs, batch)
        n = outputs.shape[0]

        def make(lo: int, hi: int) -> Tensor:
            scores = [
                likelihood.score(outputs, likelihood.sample(outputs, Stream(self.seed, start, n, j, outputs.device)), y)
                for j in range(lo, hi)
            ]
            return torch.stack(scores) / self.samples**0.5

        return Columns(self.samples, make)


def seed_of(generator: torch.Generator | None) -> int:
    """One integer from a generator (the global one when ``None``)."""
    device = generator.device if generator is not None else torch.device("cpu")
    return int(torch.randint(2**62, (1,), generator=generator, device=device))


class Stream:
    """Uniform numbers in (0, 1) that depend on (seed, running index of the example, sample, draw) and nothing else.

    A counter-based generator: every number is the splitmix64 hash of its own key, so neither batch size nor the number
    of processes changes a draw.
    """

    def __init__(self, seed: int, start: int, n: int, sample: int, device: torch.device) -> None:
        self._index = torch.arange(start, start + n, device=device)
        self._base = _mix(_mix(torch.tensor(seed, device=device)) + sample)
        self._drawn = 0

    def __call__(self, *shape: int) -> Tensor:
        """``(n, *shape)``, float64."""
        bits = self._bits(torch.Size(shape).numel())
        return ((_shift(bits, 11).double() + 0.5) * 2.0**-53).view(len(self._index), *shape)

    def signs(self, *shape: int) -> Tensor:
        """Random signs ``(n, *shape)``, int8: 64 of one draw."""
        size = torch.Size(shape).numel()
        octets = self._bits(-(-size // 64)).view(torch.uint8).unsqueeze(-1)
        ones = (octets >> torch.arange(8, dtype=torch.uint8, device=octets.device)) & 1
        return (1 - 2 * ones.flatten(1)[:, :size].to(torch.int8)).view(len(self._index), *shape)

    def _bits(self, size: int) -> Tensor:
        counter = torch.arange(self._drawn, self._drawn + size, device=self._index.device)
        self._drawn += size
        return _mix(_mix(self._base + self._index).unsqueeze(1) + counter)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 tensors with wrap-around."""
    x = x + -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)
