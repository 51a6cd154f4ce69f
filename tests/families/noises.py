"""Noises ``(n, 4) -> (n, 4)``: forward passes that are random, or that change something which outlives them."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Drawn(nn.Module):
    """Any function that draws."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


class Counter(nn.Module):
    """Counts its calls in a buffer; ``used``: the count is part of the output."""

    def __init__(self, used: bool):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.used = used

    def forward(self, h):
        self.calls += 1
        return h * (1 + self.calls) if self.used else h


class Attribute(nn.Module):
    """Counts its calls in a plain number that the output depends on."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, h):
        self.calls += 1
        return h * (1 + self.calls)


class Average(nn.Module):
    """A running mean in a buffer, subtracted as vector-quantising and normalising layers do."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.inplace = inplace

    def forward(self, h):
        out = h - self.mean
        if self.inplace:
            self.mean.lerp_(h.detach().mean(0), 0.1)
        else:
            self.mean = self.mean.lerp(h.detach().mean(0), 0.1)
        return out


class Codes(nn.Module):
    """The nearest of some codes, straight through; codes used are counted."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(5, 4, dtype=torch.float64))
        self.register_buffer("used", torch.zeros(5, dtype=torch.float64))

    def forward(self, h):
        nearest = (h.detach()[:, None] - self.codes).square().sum(-1).argmin(1)
        self.used += F.one_hot(nearest, 5).sum(0)
        return h + (self.codes[nearest] - h).detach() + 0.1 * h.sin()


def drop_path(h: Tensor) -> Tensor:
    """Whole examples left out."""
    return h * torch.empty(len(h), 1, dtype=h.dtype).bernoulli_(0.7)


def fixed(h: Tensor) -> Tensor:
    """The same draw at every pass: no noise at all."""
    return h + torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=h.dtype)


def chosen(h: Tensor) -> Tensor:
    """A category drawn from a softmax."""
    p = h.softmax(-1)
    return h * F.one_hot(p.detach().multinomial(1)[:, 0], 4)


def spectral(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Spectral norm in training mode: power iterations change its buffers at every pass."""
    return norm(nn.Linear(4, 4)).double().train()


NOISES: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "dropout": lambda: nn.Dropout(0.5).train(),
    "functional dropout": lambda: Drawn(lambda h: F.dropout(h, 0.5)),
    "alpha dropout": lambda: nn.AlphaDropout(0.5).train(),
    "rrelu": lambda: nn.RReLU().train(),
    "drop path": lambda: Drawn(drop_path),
    "bernoulli": lambda: Drawn(lambda h: h * torch.bernoulli(h.detach().sigmoid())),
    "gumbel softmax": lambda: Drawn(lambda h: F.gumbel_softmax(h)),
    "hard gumbel softmax": lambda: Drawn(lambda h: F.gumbel_softmax(h, hard=True) * h),
    "randn_like": lambda: Drawn(lambda h: h + 0.1 * torch.randn_like(h)),
    "rand": lambda: Drawn(lambda h: h * torch.rand(4, dtype=h.dtype)),
    "normal_": lambda: Drawn(lambda h: h * torch.empty_like(h).normal_(1, 0.1)),
    "reparametrised": lambda: Drawn(lambda h: torch.distributions.Normal(h, 0.5).rsample()),
    "randperm": lambda: Drawn(lambda h: h[:, torch.randperm(4)]),
    "exponential_": lambda: Drawn(lambda h: h / (1 + torch.empty_like(h).exponential_())),
    "multinomial": lambda: Drawn(chosen),
    "numpy": lambda: Drawn(lambda h: h * float(np.random.rand())),
    "numpy generator": lambda: Drawn(lambda h, draws=np.random.default_rng(0): h * float(draws.random())),
    "python": lambda: Drawn(lambda h: h * random.random()),
    "own generator": lambda: Drawn(lambda h, g=torch.Generator(): h + torch.randn(4, generator=g, dtype=h.dtype)),
    "generator seeded at every pass": lambda: Drawn(fixed),
    "counter in the output": lambda: Counter(used=True),
    "attribute": Attribute,
    "running mean": lambda: Average(inplace=True),
    "running mean replaced": lambda: Average(inplace=False),
    "batch norm in training": lambda: nn.BatchNorm1d(4).double().train(),
    "spectral norm": lambda: spectral(nn.utils.parametrizations.spectral_norm),
    "spectral norm by hooks": lambda: spectral(nn.utils.spectral_norm),
    "sometimes": lambda: Drawn(lambda h: h * torch.rand_like(h) if h[0, 0] > 0 else h),
    "counter": lambda: Counter(used=False),
    "codes": Codes,
    "draw unused": lambda: Drawn(lambda h: h if torch.rand(1) < 2 else 2 * h),
    "noise of zero": lambda: Drawn(lambda h: h + 0 * torch.randn_like(h)),
    "dropout of zero": lambda: nn.Dropout(0.0).train(),
    "batch norm": lambda: nn.BatchNorm1d(4).double().eval(),
    "python unused": lambda: Drawn(lambda h: h if random.random() < 2 else 2 * h),
}
