"""Models with outputs of every shape, and the likelihoods and losses that every suite tries on them: a new one is one
line here, with what it says in closed form.
"""

from __future__ import annotations

import reference
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng

N = 6
DIM = {"plain": 1, "segmentation": 1, "tokens": -1}
ragged = lambda x, y=None: [(x[:2],), (x[2:],)] if y is None else [(x[:2], y[:2]), (x[2:], y[2:])]


def problem(kind):
    """A small model with outputs ``(n, 3)``, ``(n, 3, 2, 2)`` (segmentation) or ``(n, 4, 3)`` (tokens), and labels,
    some of them -100.
    """
    torch.manual_seed(0)
    if kind == "plain":
        model, x, y = (
            nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)),
            torch.randn(N, 4),
            torch.randint(0, 3, (N,)),
        )
    elif kind == "segmentation":
        model, x, y = (
            nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 3, 1)),
            torch.randn(N, 2, 3, 3),
            torch.randint(0, 3, (N, 2, 2)),
        )
    else:
        model, x, y = (
            nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 3)),
            torch.randint(0, 5, (N, 4)),
            torch.randint(0, 3, (N, 4)),
        )
    model = model.double()
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, dtype=torch.float64))
    if kind != "plain":
        y.view(N, -1)[0, 1:], y.view(N, -1)[2] = -100, -100
    return model, x.double() if x.is_floating_point() else x, y


class Exponential(nng.Likelihood):
    """Waiting times; outputs are log-rates. Fisher information of a log-rate: one."""

    def square_root(self, outputs, targets=None):
        return torch.diag_embed(torch.ones_like(outputs)).movedim(1, 0)

    def sample(self, outputs, uniform):
        return -uniform(outputs.shape[1]).to(outputs).log() / outputs.exp()

    def log_prob(self, outputs, targets):
        return (outputs - targets * outputs.exp()).sum(1)


VARIANCE = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
EXACT = {  # likelihood -> the Fisher information of outputs f (n, 3), in closed form
    "bernoulli": ("bernoulli", lambda f: torch.diag_embed(f.sigmoid() * (1 - f.sigmoid()))),
    "gaussian": ("gaussian", lambda f: torch.eye(3, dtype=f.dtype).expand(len(f), 3, 3)),
    "variance": (nng.Gaussian(2.5), lambda f: torch.eye(3, dtype=f.dtype).expand(len(f), 3, 3) / 2.5),
    "variances": (nng.Gaussian(VARIANCE), lambda f: torch.diag(1 / VARIANCE).to(f).expand(len(f), 3, 3)),
    "poisson": (nng.Poisson(), lambda f: torch.diag_embed(f.exp())),
    "categorical": ("categorical", reference.softmax_metric),
    "own": (Exponential(), lambda f: torch.eye(3, dtype=f.dtype).expand(len(f), 3, 3)),
}
SAMPLED = {name: ("plain", likelihood) for name, (likelihood, _) in EXACT.items()}
SAMPLED |= {"tokens": ("tokens", nng.Categorical(-1)), "segmentation": ("segmentation", "categorical")}

WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
tokens_loss = lambda **o: lambda f, y: F.cross_entropy(f.movedim(-1, 1), y, reduction="none", **o).sum(1)
LOSSES = {
    "plain": ("plain", "cross_entropy", lambda f, y: F.cross_entropy(f, y, reduction="none")),
    "weight": ("plain", nng.CrossEntropy(WEIGHT), lambda f, y: F.cross_entropy(f, y, WEIGHT, reduction="none")),
    "float32 weight": (
        "plain",
        nng.CrossEntropy(WEIGHT.float()),
        lambda f, y: F.cross_entropy(f, y, WEIGHT.float().double(), reduction="none"),
    ),
    "smoothing": (
        "plain",
        nng.CrossEntropy(label_smoothing=0.3),
        lambda f, y: F.cross_entropy(f, y, label_smoothing=0.3, reduction="none"),
    ),
    "both": (
        "plain",
        nng.CrossEntropy(WEIGHT, 0.3),
        lambda f, y: F.cross_entropy(f, y, WEIGHT, label_smoothing=0.3, reduction="none"),
    ),
    "segmentation": ("segmentation", "cross_entropy", lambda f, y: F.cross_entropy(f, y, reduction="none").sum((1, 2))),
    "tokens": ("tokens", nng.CrossEntropy(dim=-1), tokens_loss()),
    "tokens all": ("tokens", nng.CrossEntropy(WEIGHT, 0.2, dim=-1), tokens_loss(weight=WEIGHT, label_smoothing=0.2)),
    "callable": ("plain", lambda f, y: f.logsumexp(1) + f[:, 0].cosh(), lambda f, y: f.logsumexp(1) + f[:, 0].cosh()),
    "linear": ("plain", lambda f, y: f.sum(1), lambda f, y: f.sum(1) + 0 * f.square().sum(1)),
}
