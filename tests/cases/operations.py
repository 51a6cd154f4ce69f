"""Small models of usual and unusual operations, each with its parameters used once or in several ways."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


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


class Einsum(nn.Module):
    """Heads written as einsums, batched over a group axis in the middle."""

    def __init__(self):
        super().__init__()
        self.up, self.mix, self.down = (nn.Parameter(torch.empty(s)) for s in ((3, 2, 2), (2, 2, 3), (2, 3, 3)))

    def forward(self, x):
        h = torch.einsum("...i,ihd->...hd", x, self.up).tanh()
        h = torch.einsum("nthd,hde->nthe", h, self.mix).tanh()
        return torch.einsum("bthd,hdo->bo", h, self.down)


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


class Bilinear(nn.Module):
    """A bilinear map of the input and a function of it."""

    def __init__(self):
        super().__init__()
        self.map = nn.Bilinear(3, 3, 3)

    def forward(self, x):
        return self.map(x, torch.tanh(x))


def weight_norm() -> nn.Module:
    """A parametrised weight."""
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))


def frozen() -> nn.Module:
    """The first layer does not train."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    return model
