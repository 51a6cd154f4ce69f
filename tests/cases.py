"""The zoo: small models nobody tuned to, each with a ragged loader in float64. A new member is one line in
``CASES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class Unseen(torch.autograd.Function):
    """``x @ w.T`` in a function of its own, which no function-call mode sees."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.detach() @ w.detach().T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.mT @ x


class Head(nn.Module):
    """Any body, pooled to three outputs by fixed nonlinear functions of all its features."""

    def __init__(self, *body: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x):
        y = self.body(x).flatten(1)
        ramp = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype, device=y.device)
        return torch.stack([y.sin().mean(1), (y * ramp).mean(1), 0.3 * y.square().mean(1)], 1)


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


class Attention(nn.Module):
    """Multi-head self-attention, batch first."""

    def __init__(self, **options):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True, **options), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class CrossAttention(nn.Module):
    """Attention with separate query, key and value projections, sequence first."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, kdim=3, vdim=2), nn.Linear(4, 3)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.head(self.attention(x, x[..., :3], x[..., 2:])[0].mean(0))


class ClassToken(nn.Module):
    """A learned token in front of the sequence."""

    def __init__(self):
        super().__init__()
        self.token, self.layer, self.head = nn.Parameter(torch.empty(1, 1, 4)), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(torch.tanh(self.layer(h)).cumsum(1)[:, -1])


class Recurrent(nn.Module):
    """A recurrent cell: no adapter knows it."""

    def __init__(self, cell=nn.GRU):
        super().__init__()
        self.cell, self.head = cell(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Residual(nn.Module):
    """A residual block with in-place activations and additions."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.norm = (
            nn.Conv2d(2, 2, 3, padding=1),
            nn.Conv2d(2, 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(2),
        )
        self.head = nn.Linear(18, 3)

    def forward(self, x):
        h = F.relu(self.c1(x), inplace=True)
        h = self.norm(self.c2(h))
        h += x
        return self.head(F.relu_(h).flatten(1))


class Bare(nn.Module):
    """Bare parameters in usual and unusual operations."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.empty(4)), nn.Parameter(torch.empty(4))
        self.matrix, self.odd = nn.Parameter(torch.empty(4, 3)), nn.Parameter(torch.empty(3))

    def forward(self, x):
        h = torch.tanh(x * self.scale + self.shift)
        return h @ self.matrix * torch.exp(self.odd) - self.odd


class TimeFirst(nn.Module):
    """Positions before examples, and examples folded into positions; as many positions as examples in one batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(2, 3), nn.Linear(3, 3), nn.LayerNorm(3)

    def forward(self, x):
        t, n = x.shape[1], x.shape[0]
        h = torch.tanh(self.a(x.transpose(0, 1)))
        h = self.norm(self.b(h.reshape(t * n, 3))).view(t, n, 3)
        return h.sin().sum(0)


class Shared(nn.Module):
    """A constant table mapped by a layer and added to every example: a use without an example axis."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, 12).view(4, 3))
        self.map, self.head = nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(torch.tanh(x + torch.tanh(self.map(self.table.to(x.dtype)))).sum(1))


class Decoder(nn.Module):
    """Tokens and positions looked up, positions once for the whole batch; the head is the table of tokens."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.norm = nn.Embedding(5, 3), nn.Embedding(4, 3), nn.LayerNorm(3)

    def forward(self, x):
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return F.linear(self.norm(h).tanh().mean(1), self.tokens.weight)[:, 1:4]


class VisionTokens(nn.Module):
    """Two learned tokens, one expanded and one repeated, and a table of positions added to all."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.empty(1, 1, 3)), nn.Parameter(torch.empty(1, 1, 3))
        self.positions, self.head = nn.Parameter(torch.empty(1, 4, 3)), nn.Linear(3, 3)

    def forward(self, x):
        h = torch.cat([self.first.expand(len(x), -1, -1), x, self.second.repeat(len(x), 1, 1)], 1) + self.positions
        return self.head(torch.tanh(h)).cumsum(1)[:, -1]


class Einsum(nn.Module):
    """Heads written as einsums, batched over a group axis in the middle."""

    def __init__(self):
        super().__init__()
        self.up, self.mix, self.down = (nn.Parameter(torch.empty(s)) for s in ((3, 2, 2), (2, 2, 3), (2, 3, 3)))

    def forward(self, x):
        h = torch.einsum("...i,ihd->...hd", x, self.up).tanh()
        h = torch.einsum("nthd,hde->nthe", h, self.mix).tanh()
        return torch.einsum("bthd,hdo->bo", h, self.down)


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


class EncoderDecoder(nn.Module):
    """A standard decoder layer with a causal mask, looking at its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype, device=x.device)
        return self.head(self.layer(x, x.flip(1), tgt_mask=mask)).mean(1)


class Experts(nn.Module):
    """Slices of one stacked parameter used as matrices, and a convolution whose weight is a view."""

    def __init__(self):
        super().__init__()
        self.experts, self.gate = nn.Parameter(torch.empty(2, 3, 4)), nn.Linear(4, 2)

    def forward(self, x):
        p = self.gate(x).softmax(-1)
        return p[:, :1] * F.linear(x, self.experts[0]) + p[:, 1:] * torch.tanh(x @ self.experts[1].T)


class Temperature(nn.Module):
    """A logit scale of no dimensions, used twice, and a shift of none."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.shift = (
            nn.Linear(4, 3),
            nn.Parameter(torch.empty(())),
            nn.Parameter(torch.empty(())),
        )

    def forward(self, x):
        return torch.tanh(self.layer(x) * self.scale - self.shift) * self.scale.exp()


class Spectral(nn.Module):
    """A product with complex numbers made of a real parameter, and a norm whose weight scales again."""

    def __init__(self):
        super().__init__()
        self.filter, self.norm, self.head = nn.Parameter(torch.empty(3, 2)), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(self.filter), n=4)
        return self.head(torch.tanh(self.norm(h)) * self.norm.weight)


def weight_norm() -> nn.Module:
    """A parametrised weight."""
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))


def frozen() -> nn.Module:
    """The first layer does not train."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    return model


def transformer() -> nn.Module:
    """A standard encoder layer."""
    return nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)


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
    "bilinear": (lambda: _Bilinear(), normal(3)),
    "weight-norm": (weight_norm, normal(4)),
    "time-first": (TimeFirst, normal(4, 2)),
    "shared-table": (Shared, normal(4, 2)),
    "frozen": (frozen, normal(4)),
    "temperature": (Temperature, normal(4)),
    "spectral": (Spectral, normal(4)),
}


class _Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Bilinear(3, 3, 3)

    def forward(self, x):
        return self.map(x, torch.tanh(x))
