"""The model that the axes meet in, and what autograd says of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .state import unchanged

OUTPUTS = 2
STEP = 3e-6  # of differences, which are then right to about 1e-9


class Net(nn.Module):
    """``head(h + coefficient * gate * placing(block, h, key))`` of ``h = body(x)``; ``key`` is a number an example."""

    def __init__(self, body: nn.Module, block: nn.Module, placing: Callable[..., Tensor]):
        super().__init__()
        self.body, self.block, self.placing, self.noise = body, block, placing, nn.Identity()
        self.gate, self.head = nn.Parameter(torch.ones(1)), nn.Linear(4, OUTPUTS)
        self.coefficient, self.open, self.watch = 1.0, None, None

    def forward(self, x):
        x = x.to(self.head.weight.dtype) if x.is_floating_point() else x
        h = self.body(x)
        key = self.key(x).to(h.dtype)
        y = self.placing(self.block, h, key)
        if self.open is not None:
            y = y * F.relu(self.open * key)[:, None]
        return self.head(self.noise((h + self.coefficient * self.gate * y).sin()))

    @staticmethod
    def key(x: Tensor) -> Tensor:
        """What decides where examples go, ``(n,)``."""
        x = x if x.is_floating_point() else x.double() - 2.5
        return x.flatten(1).sum(1) + 0.3 * x.flatten(1)[:, 0]


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Parameters and running statistics drawn anew, in float64 and evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.7 * draw(p))
        for m in model.modules():
            if getattr(m, "running_var", None) is not None:
                m.running_mean.copy_(draw(m.running_mean))
                m.running_var.copy_(draw(m.running_var).square() + 0.5)
    return model


def by_output(f: Tensor) -> list[list[Tensor]]:
    """The entries of ``(n, c)`` with their graph, ``[c][n]``."""
    with torch.enable_grad():
        return [list(output) for output in f.T]


class Truth:
    """Plain autograd of the outputs of whole batches: one backward pass an example and output.

    Second derivatives are differences of these: double backward is not always there, nor always right (weight norm).
    ``call`` maps inputs to outputs ``(n, c)``; parameters are those of the model that is measured.
    """

    def __init__(self, call: Callable[[Any], Tensor], model: nn.Module, batches: list[tuple[Tensor, Tensor]]):
        self.call, self.model = call, model
        self.batches = [(x.clone(), y.clone()) for x, y in batches]  # inference tensors have no derivatives
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.n = sum(len(x) for x, _ in batches)

    def gradient(self, f: Tensor) -> Tensor:
        """``(d,)``; zero where nothing is reached."""
        grads: Any = [None] * len(self.parameters)
        if f.requires_grad:
            grads = torch.autograd.grad(f, self.parameters, retain_graph=True, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, self.parameters)])

    @cached_property
    def outputs(self) -> list[Tensor]:
        """One a batch, with their graph."""
        with unchanged(self.model), torch.enable_grad():
            return [self.call(x.clone()) for x, _ in self.batches]

    @property
    def certain(self) -> bool:
        """Whether one pass after another gives the same."""
        with unchanged(self.model), torch.no_grad():
            first, second = ([self.call(x) for x, _ in self.batches] for _ in range(2))
            return all(torch.equal(a, b) for a, b in zip(first, second))

    @cached_property
    def reached(self) -> bool:
        """Whether any output of any batch has a path to any parameter; where not, only an error is right."""
        ones = torch.ones_like
        grad = lambda f: torch.autograd.grad(f, self.parameters, ones(f), retain_graph=True, allow_unused=True)
        return any(g is not None for f in self.outputs if f.requires_grad for g in grad(f))

    @cached_property
    def rows(self) -> Tensor:
        """The Jacobian ``(c, n, d)``."""
        of_batch = lambda f: torch.stack([torch.stack([self.gradient(e) for e in output]) for output in by_output(f)])
        return torch.cat([of_batch(f) for f in self.outputs], 1).detach()

    @cached_property
    def roots(self) -> Tensor:
        """Rows ``(c, n, d)`` whose second moment is the softmax Fisher matrix."""
        p = torch.cat(self.outputs).detach().softmax(-1)
        root = p.sqrt()[:, :, None] * torch.eye(p.shape[1]) - p[:, :, None] * p.sqrt()[:, None]  # (n, c, e)
        return torch.einsum("nce,cnd->end", root, self.rows)

    @cached_property
    def fisher(self) -> Tensor:
        """The exact categorical Fisher matrix ``(d, d)``."""
        return torch.einsum("end,enf->df", self.roots, self.roots) / self.n

    @cached_property
    def loss_rows(self) -> Tensor:
        """Gradients of each example's cross-entropy, ``(n, d)``."""
        residual = torch.cat(self.outputs).detach().softmax(-1)
        residual = residual - F.one_hot(torch.cat([y for _, y in self.batches]), residual.shape[1])
        return torch.einsum("nc,cnd->nd", residual, self.rows)

    @cached_property
    def loss_gradient(self) -> Tensor:
        """The gradient of the mean cross-entropy."""
        terms = zip(self.outputs, (y for _, y in self.batches))
        with torch.enable_grad():
            return self.gradient(sum(F.cross_entropy(f, y, reduction="sum") for f, y in terms) / self.n)

    @property
    def trace(self) -> Tensor:
        """``tr K``."""
        return self.rows.square().sum()

    def smooth(self, name: str, direction: Tensor) -> bool:
        """Whether a quantity has the same slope on both sides: no ReLU or argmax changes hands right here."""
        right, left = self.along(name, direction, (1, 0)), self.along(name, direction, (0, -1))
        return bool((right - left).norm() <= 1e-2 * (right.norm() + left.norm()))

    def along(self, name: str, direction: Tensor, sides: tuple[int, int] = (1, -1)) -> Tensor:
        """The derivative of a quantity in a direction ``(d,)`` of parameter space: a difference, in float64."""
        dtype, values = self.parameters[0].dtype, []
        self.model.double()
        kept = [p.detach().clone() for p in self.parameters]
        steps = direction.double().split([p.numel() for p in self.parameters])
        for side in sides:
            with torch.no_grad():
                for p, old, step in zip(self.parameters, kept, steps):
                    p.copy_(old + side * STEP * step.view_as(p))
            values.append(getattr(Truth(self.call, self.model, self.batches), name))
        with torch.no_grad():
            for p, old in zip(self.parameters, kept):
                p.copy_(old)
        self.model.to(dtype)
        return (values[0] - values[1]) / ((sides[0] - sides[1]) * STEP)
