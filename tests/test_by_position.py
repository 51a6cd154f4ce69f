"""Kernels and influence by position, against gradients of outputs with one position let through at a time."""

import functools

import pytest
import torch
from cases import build
from torch import nn

import nngeom as nng

f64 = torch.float64


class Tokens(nn.Module):
    """A tied language model without norms: every parameter is used at every token."""

    def __init__(self, tied=True):
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 7, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.table(x)).cumsum(1))).mean(1)


class Cut(nn.Module):
    """The same function, with parameters of one position's own: their gradients are that position's."""

    def __init__(self, model, t):
        super().__init__()
        self.model, self.t = model, t

    def forward(self, x, own):
        t = x.shape[1]
        pick = [own if j == self.t else {k: v.detach() for k, v in own.items()} for j in range(t)]
        inner = [p["table.weight"][x[:, j]] @ p["mix.weight"].T + p["mix.bias"] for j, p in enumerate(pick)]
        hidden = torch.tanh(torch.stack(inner, 1).cumsum(1))
        heads = [hidden[:, j] @ p.get("head.weight", p["table.weight"]).T for j, p in enumerate(pick)]
        return torch.stack(heads, 1).mean(1)


@functools.cache
def setting(tied):
    torch.manual_seed(int(tied))
    model = Tokens(tied).to(f64)
    x = torch.randint(0, 7, (7, 4))
    y = torch.randint(0, 7, (7,))
    return model, [(x[:3], y[:3]), (x[3:], y[3:])], x, y


def rows(model, x, t, value=None):
    """``(c, n, d)``: gradients of the outputs, or of ``value`` of them, through position ``t`` alone."""
    named = dict(model.named_parameters())
    f = Cut(model, t)(x, named)
    f = f if value is None else value(f)[:, None]
    out = []
    for k in range(f.shape[1]):
        for n in range(f.shape[0]):
            g = torch.autograd.grad(f[n, k], list(named.values()), retain_graph=True)
            out.append(torch.cat([p.flatten() for p in g]))
    return torch.stack(out).view(f.shape[1], f.shape[0], -1)


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * float(b.abs().max()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [None, nng.PMatDense, nng.PMatKFAC, nng.PMatEKFAC, nng.PMatDiag, nng.PMatBlockDiag])
def test_kernels(tied, kind):
    model, loader, x, _ = setting(tied)
    parts = torch.stack([rows(model, x, t) for t in range(x.shape[1])])  # [t c n d]
    metric = None if kind is None else nng.FIM(model, loader, kind).inverse(0.3)
    dense = torch.eye(parts.shape[-1], dtype=f64) if metric is None else metric.to_dense()
    expected = torch.einsum("knd,de,tlme->knlmt", parts.sum(0), dense, parts)
    k = nng.GramMatrix(model, loader, metric=metric, by_position=True)
    close(k.tensor, expected)
    close(k.total().tensor, nng.GramMatrix(model, loader, metric=metric).tensor)
    tight = nng.GramMatrix(model, loader, metric=metric, by_position=True, memory_budget=30_000)
    close(tight.tensor, expected)
    few = [(x[:2], loader[0][1][:2])]
    close(nng.GramMatrix(model, loader, other=few, metric=metric, by_position=True).tensor, expected[..., :2, :])


@pytest.mark.parametrize("kind", [nng.PMatDense, nng.PMatEKFAC, nng.PMatLowRank])
def test_influence(kind):
    model, loader, x, y = setting(True)
    queries = [(x[2:5], y[2:5])]
    m = nng.FIM(model, loader, kind)
    options = {"loss": "cross_entropy", "damping": 0.2}
    found = nng.influence(model, loader, queries, m, by_position=True, by_layer=True, **options)
    loss = lambda f: nn.functional.cross_entropy(f, y, reduction="none")
    parts = torch.stack([rows(model, x, t, loss)[0] for t in range(x.shape[1])])  # [t n d]
    inverse = torch.linalg.inv(m.to_dense() + 0.2 * torch.eye(parts.shape[-1], dtype=f64))
    close(found.scores, torch.einsum("qd,de,tne->qnt", parts.sum(0)[2:5], inverse, parts), 1e-8)
    close(torch.stack(list(found.by_layer.values())).sum(0), found.scores, 1e-8)
    whole = nng.influence(model, loader, queries, m, **options)
    close(found.scores.sum(-1), whole.scores, 1e-8)
    close(found.self_scores, whole.self_scores, 1e-8)
    k = nng.GramMatrix(model, loader, loss="cross_entropy", metric=m.inverse(0.2), by_position=True)
    close(k.tensor[0, 2:5, 0], found.scores, 1e-8)


class Normed(nn.Module):
    """Norms, a scale and a shift at every token, before and behind what mixes tokens."""

    def __init__(self, norm):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.norm = norm(4)
        self.mix, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 5)
        self.shift, self.scale = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        with torch.no_grad():
            for p in self.norm.parameters():
                p.normal_()

    def forward(self, x):
        hidden = torch.tanh(self.mix(self.norm(self.table(x))).cumsum(1) + self.shift)
        return self.head(hidden * self.scale).mean(1)


class CutNormed(Cut):
    def forward(self, x, own):
        t = x.shape[1]
        pick = [own if j == self.t else {k: v.detach() for k, v in own.items()} for j in range(t)]
        normed = []
        for j, p in enumerate(pick):
            inside = {k.removeprefix("norm."): v for k, v in p.items() if k.startswith("norm.")}
            normed.append(torch.func.functional_call(self.model.norm, inside, (p["table.weight"][x[:, j]],)))
        mixed = torch.stack([y @ p["mix.weight"].T for y, p in zip(normed, pick)], 1).cumsum(1)
        hidden = [torch.tanh(mixed[:, j] + p["shift"]) * p["scale"] for j, p in enumerate(pick)]
        return torch.stack([h @ p["head.weight"].T + p["head.bias"] for h, p in zip(hidden, pick)], 1).mean(1)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, lambda d: nn.LayerNorm(d, bias=False)])
@pytest.mark.parametrize("kind", [None, nng.PMatDense, nng.PMatKFAC, nng.PMatEKFAC, nng.PMatDiag, nng.PMatBlockDiag])
def test_norms_scales_and_shifts(norm, kind, monkeypatch):
    monkeypatch.setitem(globals(), "Cut", CutNormed)
    torch.manual_seed(0)
    model, x, y = Normed(norm).to(f64), torch.randint(0, 7, (6, 3)), torch.randint(0, 5, (6,))
    loader = [(x[:4], y[:4]), (x[4:], y[4:])]
    parts = torch.stack([rows(model, x, t) for t in range(x.shape[1])])
    metric = None if kind is None else nng.FIM(model, loader, kind).inverse(0.3)
    dense = torch.eye(parts.shape[-1], dtype=f64) if metric is None else metric.to_dense()
    k = nng.GramMatrix(model, loader, metric=metric, by_position=True)
    close(k.tensor, torch.einsum("knd,de,tlme->knlmt", parts.sum(0), dense, parts))
    close(k.total().tensor, nng.GramMatrix(model, loader, metric=metric).tensor)
    if kind is not None:
        options = {"loss": "cross_entropy", "damping": 0.2}
        found = nng.influence(model, loader, loader[:1], nng.FIM(model, loader, kind), by_position=True, **options)
        whole = nng.influence(model, loader, loader[:1], nng.FIM(model, loader, kind), **options)
        close(found.scores.sum(-1), whole.scores, 1e-8)
        close(found.self_scores, whole.self_scores, 1e-8)


def test_one_position():
    case = build("mlp")
    k = nng.GramMatrix(case.model, case.loader, by_position=True)
    close(k.tensor[..., 0], nng.GramMatrix(case.model, case.loader).tensor)
    assert "tensor=(3, 7, 3, 7, 1)" in repr(k)


def test_errors():
    model, loader, x, y = setting(True)
    norms = build("layer-norm")
    with pytest.raises(nng.StructureError, match="exclude"):
        nng.GramMatrix(norms.model, norms.loader, by_position=True)
    ragged = [*loader, (x[:2, :3], y[:2])]
    with pytest.raises(nng.OutputError, match="pad"):
        nng.GramMatrix(model, loader, other=ragged, by_position=True)
    for options in (
        {"centered": True},
        {"differentiable": True},
        {"representation": nng.FMatDiag},
        {"representation": nng.FMatImplicit},
        {"estimator": "rademacher"},
        {"out": "kernel.npy"},
    ):
        with pytest.raises(nng.ArgumentError, match="by_position"):
            nng.GramMatrix(model, loader, by_position=True, **options)
    m = nng.FIM(model, loader, nng.PMatDiag)
    for options in ({"top": 2}, {"out": "scores.npy"}):
        with pytest.raises(nng.ArgumentError, match="by_position"):
            nng.influence(model, loader, loader, m, loss="cross_entropy", damping=0.1, by_position=True, **options)
