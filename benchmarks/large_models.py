"""Two larger nets in plain torch, random weights: one of ResNet-50's shape, one of GPT-2 small's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.workloads import EncoderBlock


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut (He et al. 2016, figure 5)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(n, inputs, h, w)`` to ``(n, 4 width, h / stride, w / stride)``."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


def resnet(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, outputs: int = 200) -> nn.Module:
    """Bottleneck blocks behind a 7x7 stem; BatchNorm in evaluation mode, with the statistics of a random batch."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(channels, width * 2**stage, 2 if stage and not block else 1))
            channels = 4 * width * 2**stage
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None  # the plain mean over batches: here of one
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64))
    return model.eval()


class DecoderBlock(EncoderBlock):
    """The same, each position to those before it, with GPT-2's activation."""

    approximate = "tanh"

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``(n, heads, t, width / heads)``."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Decoder(nn.Module):
    """A causal language model whose head is its embedding."""

    def __init__(
        self, depth: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50_257, positions: int = 1024
    ):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(DecoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(
                    p, std=0.02 / (2 * depth) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
                )
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: Tensor) -> Tensor:
        """``(n, t)`` to ``(n, t, vocabulary)``."""
        where = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.tokens(ids) + self.positions(where)
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)
