"""The zoo: small models nobody tuned to, each with a ragged loader in float64. A new member is one line in
``CASES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cases.attention import Attention, CrossAttention, EncoderDecoder, transformer
from cases.operations import (
    Bare,
    Bilinear,
    Einsum,
    Experts,
    Head,
    Recurrent,
    Residual,
    Spectral,
    Temperature,
    TimeFirst,
    frozen,
    weight_norm,
)
from cases.sharing import (
    ClassToken,
    Decoder,
    Reused,
    Shared,
    SlicedPositions,
    TiedAutoencoder,
    TiedLanguageModel,
    VisionTokens,
)


@dataclass(frozen=True)
class Case:
    """A model and data, ready to measure. ``c`` outputs, ``n`` examples in ragged batches."""

    model: nn.Module
    loader: list[tuple[Tensor, Tensor]]

    @property
    def inputs(self) -> Tensor:
        """All inputs."""
        return torch.cat([x for x, _ in self.loader])

    @property
    def targets(self) -> Tensor:
        """All labels."""
        return torch.cat([y for _, y in self.loader])

    @property
    def n(self) -> int:
        """Number of examples."""
        return sum(len(x) for x, _ in self.loader)


def build(name: str, dtype: torch.dtype = torch.float64, outputs: int = 3, sizes: tuple[int, ...] = (3, 4)) -> Case:
    """A case by name, seeded; the same name gives the same numbers."""
    torch.manual_seed(sum(map(ord, name)))
    make, draw = CASES[name]
    model = make().to(dtype)
    for p in model.parameters():
        p.data.copy_(0.6 * torch.randn(p.shape, dtype=torch.float64))
    for b in model.modules():
        if isinstance(b, (nn.BatchNorm1d, nn.BatchNorm2d)):
            b.running_mean.copy_(torch.randn(b.running_mean.shape))
            b.running_var.copy_(torch.rand(b.running_var.shape) + 0.5)
    model.eval()
    loader = []
    for size in sizes:
        x = draw(size)
        loader.append((x.to(dtype) if x.is_floating_point() else x, torch.randint(0, outputs, (size,))))
    return Case(model, loader)


def normal(*shape: int) -> Callable[[int], Tensor]:
    """Standard normal inputs."""
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def tokens(size: int, *shape: int) -> Callable[[int], Tensor]:
    """Integer inputs."""
    return lambda n: torch.randint(0, size, (n, *shape))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), normal(4)),
    "inplace": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3, bias=False)), normal(4)),
    "sequence": (lambda: Head(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), normal(4, 3)),
    "image-of-vectors": (lambda: Head(nn.Linear(3, 2)), normal(2, 3, 3)),
    "conv1d": (lambda: Head(nn.Conv1d(4, 6, 3, 2, 1, 2, groups=2)), normal(4, 9)),
    "conv2d": (lambda: Head(nn.Conv2d(4, 4, (3, 2), (2, 1), (1, 0), (1, 2), groups=2)), normal(4, 5, 5)),
    "conv2d-same": (lambda: Head(nn.Conv2d(2, 3, (3, 2), padding="same", dilation=2)), normal(2, 4, 5)),
    "conv2d-circular": (lambda: Head(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")), normal(2, 4, 4)),
    "conv2d-reflect": (lambda: Head(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), normal(2, 4, 4)),
    "depthwise": (lambda: Head(nn.Conv2d(3, 3, 3, groups=3, bias=False)), normal(3, 5, 5)),
    "conv3d": (lambda: Head(nn.Conv3d(2, 2, 2, 1, 1)), normal(2, 2, 3, 3)),
    "deconv1d": (lambda: Head(nn.ConvTranspose1d(4, 6, 3, 2, 1, output_padding=1, groups=2)), normal(4, 5)),
    "deconv2d": (lambda: Head(nn.ConvTranspose2d(2, 3, (3, 2), 2, (1, 0), dilation=(1, 2))), normal(2, 3, 4)),
    "deconv3d": (lambda: Head(nn.ConvTranspose3d(2, 2, 2)), normal(2, 2, 2, 2)),
    "residual": (Residual, normal(2, 3, 3)),
    "embedding": (lambda: Head(nn.Embedding(6, 3, padding_idx=1), nn.Linear(3, 2)), tokens(6, 4)),
    "layer-norm": (lambda: Head(nn.Linear(3, 3), nn.LayerNorm((4, 3)), nn.Tanh()), normal(4, 3)),
    "rms-norm": (lambda: Head(nn.Linear(3, 3, bias=False), nn.RMSNorm(3), nn.Tanh()), normal(4, 3)),
    "group-norm": (lambda: Head(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4)), normal(2, 3, 3)),
    "instance-norm": (lambda: Head(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True)), normal(2, 5)),
    "batch-norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)), normal(4)),
    "reused": (Reused, normal(4)),
    "tied": (TiedAutoencoder, normal(4)),
    "language-model": (TiedLanguageModel, tokens(5, 6)),
    "attention": (Attention, normal(3, 4)),
    "attention-bias-kv": (lambda: Attention(add_bias_kv=True), normal(3, 4)),
    "cross-attention": (CrossAttention, normal(3, 4)),
    "transformer": (lambda: Head(transformer()), normal(3, 4)),
    "decoder-layer": (EncoderDecoder, normal(3, 4)),
    "sliced-positions": (SlicedPositions, normal(4, 3)),
    "class-token": (ClassToken, normal(2, 4)),
    "decoder": (Decoder, tokens(5, 4)),
    "vision-tokens": (VisionTokens, normal(2, 3)),
    "einsum": (Einsum, normal(2, 3)),
    "experts": (Experts, normal(4)),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(3), nn.Linear(3, 3)), normal(4)),
    "gru": (Recurrent, normal(3, 3)),
    "lstm": (lambda: Recurrent(nn.LSTM), normal(3, 3)),
    "bare": (Bare, normal(4)),
    "bilinear": (Bilinear, normal(3)),
    "weight-norm": (weight_norm, normal(4)),
    "time-first": (TimeFirst, normal(4, 2)),
    "shared-table": (Shared, normal(4, 2)),
    "frozen": (frozen, normal(4)),
    "temperature": (Temperature, normal(4)),
    "spectral": (Spectral, normal(4)),
}
