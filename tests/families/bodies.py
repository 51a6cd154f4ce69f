"""Bodies: raw inputs ``-> (n, 4)``, each with a way to draw ``n`` inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .pools import POOLS

Draw = Callable[[int, torch.Generator], Tensor]


def normal(*shape: int) -> Draw:
    """Standard normal inputs."""
    return lambda n, generator: torch.randn(n, *shape, dtype=torch.float64, generator=generator)


def tokens(size: int, *shape: int) -> Draw:
    """Integers below ``size``."""
    return lambda n, generator: torch.randint(0, size, (n, *shape), generator=generator)


class Attention(nn.Module):
    """Self-attention, pooled."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


class Positions(nn.Module):
    """Tokens and positions looked up."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.mix = nn.Embedding(6, 4), nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.mix(self.tokens(x) + self.positions(torch.arange(x.shape[1]))).tanh().mean(1)


class Tied(nn.Module):
    """The embedding is the decoder's weight too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4)

    def forward(self, x):
        return (self.table(x).tanh() @ self.table.weight.T)[..., :4].sum(1)


class Recurrent(nn.Module):
    """A recurrent layer; packed: sequences of lengths read off the data."""

    def __init__(self, packed: bool):
        super().__init__()
        self.cell, self.packed = nn.GRU(4, 4, batch_first=True), packed

    def forward(self, x):
        if not self.packed:
            return self.cell(x)[0][:, -1]
        lengths = 1 + (x[:, 1:, 0] > 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.cell(packed)[1][0]


class ClassToken(nn.Module):
    """A learned token in front."""

    def __init__(self):
        super().__init__()
        self.token, self.layer = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.cat([self.token.expand(len(x), -1, -1), x], 1)).tanh().sum(1)


class Image(nn.Module):
    """A convolution, a norm in evaluation mode, pooling."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))


class TimeFirst(nn.Module):
    """Positions in front of examples, then folded together."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.a(x.transpose(0, 1)).tanh()
        return self.b(h.reshape(-1, 4)).view(h.shape).sin().sum(0)


class Pooled(nn.Module):
    """As many rows an example as the data says, in one table as graphs are batched; a layer; pooled into examples."""

    def __init__(self, pool: Callable[[Tensor, Tensor, int], Tensor]):
        super().__init__()
        self.pool, self.layer = pool, nn.Linear(4, 4)

    def forward(self, x):
        kept = x[..., 0] > -0.5
        return self.pool(self.layer(x[kept]).tanh(), kept.nonzero()[:, 0], len(x))


def flat(*layers: nn.Module) -> nn.Module:
    """Layers, then a linear map of all their outputs."""
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 4))


SEQUENCE = normal(3, 4)
BODIES: dict[str, tuple[Callable[[], nn.Module], Draw]] = {
    "vector": (nn.Identity, normal(4)),
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)), normal(3)),
    "sequence": (lambda: flat(nn.Linear(4, 4), nn.Tanh()), SEQUENCE),
    "time first": (TimeFirst, SEQUENCE),
    "attention": (Attention, SEQUENCE),
    "transformer": (lambda: flat(nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True)), SEQUENCE),
    "positions": (Positions, tokens(6, 3)),
    "tied": (Tied, tokens(6, 3)),
    "recurrent": (lambda: Recurrent(packed=False), SEQUENCE),
    "packed": (lambda: Recurrent(packed=True), SEQUENCE),
    "class token": (ClassToken, SEQUENCE),
    "image": (Image, normal(2, 3, 3)),
    "group norm": (lambda: flat(nn.Conv1d(3, 4, 2), nn.GroupNorm(2, 4)), SEQUENCE),
    **{f"pool by {name}": (lambda pool=pool: Pooled(pool), SEQUENCE) for name, pool in POOLS.items()},
}
