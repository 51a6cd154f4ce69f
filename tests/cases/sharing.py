"""Small models that use a parameter more than once, or once for all examples of a batch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Reused(nn.Module):
    """One module called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


class TiedAutoencoder(nn.Module):
    """A weight used as itself and transposed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 4))
        self.up, self.down = nn.Parameter(torch.empty(4)), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(F.linear(x, self.weight))
        return self.down(torch.sigmoid(F.linear(h, self.weight.T, self.up)))


class TiedLanguageModel(nn.Module):
    """Embedding tied to the decoder, positions added; logits of the mean token."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(5, 4), nn.Parameter(torch.empty(6, 4))
        self.mix, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x) + self.position
        return self.head(self.norm(h + torch.tanh(self.mix(h))).mean(1))[:, :3]


class Decoder(nn.Module):
    """Tokens and positions looked up, positions once for the whole batch; the head is the table of tokens."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.norm = nn.Embedding(5, 3), nn.Embedding(4, 3), nn.LayerNorm(3)

    def forward(self, x):
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return F.linear(self.norm(h).tanh().mean(1), self.tokens.weight)[:, 1:4]


class Shared(nn.Module):
    """A constant table mapped by a layer and added to every example: a use without an example axis."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, 12).view(4, 3))
        self.map, self.head = nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(torch.tanh(x + torch.tanh(self.map(self.table.to(x.dtype)))).sum(1))


class ClassToken(nn.Module):
    """A learned token in front of the sequence."""

    def __init__(self):
        super().__init__()
        self.token, self.layer, self.head = nn.Parameter(torch.empty(1, 1, 4)), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(torch.tanh(self.layer(h)).cumsum(1)[:, -1])


class VisionTokens(nn.Module):
    """Two learned tokens, one expanded and one repeated, and a table of positions added to all."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.empty(1, 1, 3)), nn.Parameter(torch.empty(1, 1, 3))
        self.positions, self.head = nn.Parameter(torch.empty(1, 4, 3)), nn.Linear(3, 3)

    def forward(self, x):
        h = torch.cat([self.first.expand(len(x), -1, -1), x, self.second.repeat(len(x), 1, 1)], 1) + self.positions
        return self.head(torch.tanh(h)).cumsum(1)[:, -1]


class SlicedPositions(nn.Module):
    """As many rows of a longer table of positions as the sequence has, and a slice of a vector as bias."""

    def __init__(self):
        super().__init__()
        self.positions, self.shifts, self.head = (
            nn.Parameter(torch.empty(1, 6, 3)),
            nn.Parameter(torch.empty(7)),
            nn.Linear(3, 3),
        )

    def forward(self, x):
        return self.head(torch.tanh(x + self.positions[:, : x.shape[1]] + self.shifts[2:5])).cumsum(1)[:, -1]
