"""Blocks ``(..., 4) -> (..., 4)``: ways in which a parameter is used, seen by function calls or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Unseen(torch.autograd.Function):
    """``x w^T`` as a fused kernel: no function-call mode sees the parameter's use."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).T @ x.flatten(0, -2)


class Block(nn.Module):
    """A function of the values and of parameters of given shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]):
        super().__init__()
        self.function, self.own = function, nn.ParameterList(torch.randn(s) for s in shapes)

    def forward(self, h):
        return self.function(h, *self.own)


class Force(nn.Module):
    """The negative gradient of a learned energy in its argument: weights are used again while going backward."""

    def __init__(self):
        super().__init__()
        self.a, self.energy = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, h):
        with torch.enable_grad():
            z = h if h.requires_grad else h.detach().requires_grad_()
            e = self.energy(self.a(z).tanh()).sum()
            return -torch.autograd.grad(e, z, create_graph=True)[0]


class Recurrent(nn.Module):
    """A cell run twice on every row."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, h):
        rows = h.reshape(-1, 4)
        return self.cell(rows, self.cell(rows)).view(h.shape)


class Twice(nn.Module):
    """A module called twice, then its weight used transposed."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, h):
        return F.linear(self.a(self.a(h).tanh()).tanh(), self.a.weight.T)


class Experts(nn.Module):
    """Two experts, mixed softly or one chosen for each row."""

    def __init__(self, hard: bool):
        super().__init__()
        self.gate, self.experts, self.hard = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), hard

    def forward(self, h):
        p = self.gate(h).softmax(-1)
        if not self.hard:
            return sum(p[..., k : k + 1] * e(h) for k, e in enumerate(self.experts))
        rows, p = h.reshape(-1, 4), p.reshape(-1, 2)
        weight, chosen = p.max(-1)
        out = torch.zeros_like(rows)
        for k, expert in enumerate(self.experts):
            at = (chosen == k).nonzero()[:, 0]
            out = out.index_add(0, at, weight[at, None] * expert(rows[at]))
        return out.view(h.shape)


def opened(h: Tensor) -> Tensor:
    """A gate that is open for some rows only."""
    return F.relu(h.sum(-1, keepdim=True) - 1)


def checkpointed(h: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """A block recomputed while going backward."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda x: F.linear(F.linear(x, w).tanh(), v), h, use_reentrant=False)


def faint(h: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """A second weight with gradients far below those of the first, half of them unseen."""
    return F.linear(h, w) + 2e-5 * (F.linear(h, v) + Unseen.apply(h, v))


def convolved(h: Tensor, w: Tensor) -> Tensor:
    """Features as positions of a signal."""
    return F.conv1d(h.reshape(-1, 1, 4), w, padding=1).view(h.shape).tanh()


SQUARE = (4, 4)
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)),
    "inplace": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4, bias=False)),
    "rezero": lambda: Block(lambda h, w, a: h + a * F.linear(h, w).tanh(), SQUARE, (1,)),
    "scalar gate": lambda: Block(lambda h, w, a: h + a * F.linear(h, w).tanh(), SQUARE, ()),
    "temperature": lambda: Block(lambda h, w, t: (h @ w * t.exp()).softmax(-1), SQUARE, ()),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)),
    "rms norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)),
    "scale and shift": lambda: Block(lambda h, w, b: torch.tanh(h * w + b), (4,), (4,)),
    "odd": lambda: Block(lambda h, w, b: h * w.exp() - b.sin(), (4,), (4,)),
    "prelu": lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU()),
    "addmm": lambda: Block(lambda h, w, b: torch.addmm(b, h.reshape(-1, 4), w).view(h.shape).sin(), SQUARE, (4,)),
    "einsum": lambda: Block(lambda h, w: torch.einsum("...i,iab->...ab", h, w).tanh().flatten(-2), (4, 2, 2)),
    "recurrent": Recurrent,
    "twice": Twice,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "soft experts": lambda: Experts(hard=False),
    "hard experts": lambda: Experts(hard=True),
    "fused": lambda: Block(lambda h, w: Unseen.apply(h.tanh(), w), SQUARE),
    "fused beside": lambda: Block(lambda h, w: F.linear(h, w) + Unseen.apply(h.tanh(), w), SQUARE),
    "fused behind a gate": lambda: Block(lambda h, w: F.linear(h, w) + opened(h) * Unseen.apply(h, w), SQUARE),
    "fused a little": lambda: Block(lambda h, w: F.linear(h, w) + 9e-3 * Unseen.apply(h.tanh(), w), SQUARE),
    "small gradients": lambda: Block(faint, SQUARE, SQUARE),
    "convolution": lambda: Block(convolved, (1, 1, 3)),
    "force": Force,
    "checkpointed": lambda: Block(checkpointed, SQUARE, SQUARE),
}
