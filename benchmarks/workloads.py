"""Four models with random weights and data: an MLP, LeNet-5, a narrow VGG-11, a small transformer encoder; 10
outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUTS = 10


@dataclass(frozen=True)
class Workload:
    """A model and its batches ``[(inputs, targets), ...]``."""

    name: str
    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]

    @property
    def n(self) -> int:
        """Number of examples."""
        return sum(len(x) for x, _ in self.batches)

    @property
    def inputs(self) -> Tensor:
        """All inputs."""
        return torch.cat([x for x, _ in self.batches])

    @property
    def targets(self) -> Tensor:
        """All labels."""
        return torch.cat([y for _, y in self.batches])

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name to parameter."""
        return dict(self.model.named_parameters())

    def vector(self) -> Tensor:
        """A fixed direction in parameter space, ``(d,)``, of norm one."""
        d = sum(p.numel() for p in self.model.parameters())
        v = torch.randn(d, generator=torch.Generator().manual_seed(7))
        first = next(self.model.parameters())
        return (v / v.norm()).to(first)

    def floor(self) -> tuple[Tensor, ...]:
        """One forward and one backward pass over all batches."""
        total: tuple[Tensor, ...] = ()
        parameters = list(self.model.parameters())
        for x, y in self.batches:
            grads = torch.autograd.grad(F.cross_entropy(self.model(x), y), parameters)
            total = grads if not total else tuple(a + b for a, b in zip(total, grads))
        return total


def mlp(width: int = 300, depth: int = 6, inputs: int = 784, outputs: int = OUTPUTS) -> nn.Module:
    """Linear layers and ReLU."""
    sizes = [inputs] + [width] * depth
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def lenet() -> nn.Module:
    """LeNet-5 on one channel of 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, OUTPUTS),
    )


def vgg() -> nn.Module:
    """VGG-11 at a quarter of its width, without normalisation, on 3 x 32 x 32."""
    layers: list[nn.Module] = []
    before = 3
    for width, pool in (
        (16, True),
        (32, True),
        (64, False),
        (64, True),
        (128, False),
        (128, True),
        (128, False),
        (128, True),
    ):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] + ([nn.MaxPool2d(2)] if pool else [])
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, OUTPUTS))


class EncoderBlock(nn.Module):
    """Self-attention and a feed-forward part, normalised before each."""

    approximate = "none"

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, t, width)`` to the same."""
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate=self.approximate))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every position to every other, ``(n, heads, t, width / heads)``."""
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Encoder(nn.Module):
    """A transformer encoder on vectors, pooled over positions."""

    def __init__(self, inputs: int = 64, width: int = 128, heads: int = 4, depth: int = 2):
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, t, inputs)`` to ``(n, 10)``."""
        return self.head(self.blocks(self.embed(x)).mean(1))


MODELS: dict[
    str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]
] = {  # model, shape of an input, examples, batch size
    "W1": (mlp, (784,), 512, 128),
    "W2": (lenet, (1, 28, 28), 256, 64),
    "W3": (vgg, (3, 32, 32), 64, 32),
    "W4": (Encoder, (32, 64), 64, 32),
}
EXPLICIT = {
    "W1": 64,
    "W2": 64,
    "W3": 32,
    "W4": 32,
}  # examples where explicit rows, or a step on one batch, are the result
GRAM = {"W1": 100, "W2": 100, "W3": 32, "W4": 32}
STEP = {"W1": 128, "W2": 64, "W3": 32, "W4": 32}


def workload(
    name: str,
    examples: int | None = None,
    batch: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """A workload by name, seeded."""
    build, shape, n, size = MODELS[name]
    torch.manual_seed(0)
    model = build().to(device=device, dtype=dtype)
    n = examples or n
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)).to(device=device, dtype=dtype)
    y = torch.randint(0, OUTPUTS, (n,), generator=torch.Generator().manual_seed(2)).to(device)
    size = min(batch or size, n)
    return Workload(name, model, list(zip(x.split(size), y.split(size))))


def for_job(name: str, job: str, **options) -> Workload:
    """The workload with the number of examples that the job is defined with."""
    examples = {"J5": EXPLICIT, "J6": GRAM, "J9": STEP, "J11": STEP}.get(job, {}).get(name)
    whole = job in ("J6", "J9", "J11")  # one batch
    return workload(name, examples, examples if whole else None, **options)
