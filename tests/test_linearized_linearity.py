"""The three measures of linearity: 1 at the start, and what they are by hand afterwards."""

from __future__ import annotations

import copy

import cases
import pytest
import reference
import torch
from torch import nn

import nngeom as nng
from nngeom.linearized import Linearized, Scaled, linearity


class Net(nn.Module):
    """Three kinds of rectifiers, one in place, one not a module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.act(self.a(x))
        h = nn.functional.leaky_relu(self.b(h))
        return self.d(torch.clamp(self.c(h), min=0))


def cosine(k, l):
    return float((k * l).sum() / (k.norm() * l.norm()))


def moved(model, scale):
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.add_(scale * torch.randn(p.shape, dtype=p.dtype))
    return other


@pytest.mark.parametrize("name", ["mlp", "inplace", "residual", "transformer", "bare", "reused", "frozen"])
def test_all_are_one_at_the_start(name):
    case = cases.build(name)
    result = linearity(case.model, copy.deepcopy(case.model), case.loader)
    assert not result.units or result.sign_similarity == 1
    assert abs(result.kernel_alignment - 1) < 1e-12 and abs(result.representation_alignment - 1) < 1e-12
    moving = linearity(moved(case.model, 0.5), case.model, case.loader)
    assert not moving.units or 0 <= moving.sign_similarity <= 1
    assert 0 <= moving.kernel_alignment < 1 - 1e-6
    assert 0 <= moving.representation_alignment <= 1 + 1e-12


def test_against_loops():
    model = Net().double()
    now, x = moved(model, 0.3), torch.randn(7, 4, dtype=torch.float64)
    result = linearity(now, model, [(x[:3],), (x[3:],)])

    def by_hand(m):
        a = m.a(x)
        b = m.b(a.relu())
        h = torch.where(b > 0, b, 0.01 * b)
        c = m.c(h)
        j = reference.jacobian(m, x).flatten(0, 1)
        b, h, c = b.detach(), h.detach(), c.detach()
        return torch.cat([a > 0, b > 0, c > 0], 1), j @ j.T, c.relu() @ c.relu().T, b @ b.T, h @ h.T

    (s, k, r, _, h), (s0, k0, r0, _, h0) = by_hand(now), by_hand(model)
    assert result.units == 7 * 16 and abs(result.sign_similarity - float((s == s0).double().mean())) < 1e-12
    assert abs(result.kernel_alignment - cosine(k, k0)) < 1e-10
    assert abs(result.representation_alignment - cosine(r, r0)) < 1e-10
    named = linearity(now, model, [(x,)], layer="c")
    assert abs(named.representation_alignment - cosine(h, h0)) < 1e-10 and named.units == result.units


def test_a_linear_network_stays_linear():
    model = nn.Linear(4, 3).double()
    result = linearity(moved(model, 1.0), model, (torch.randn(5, 4, dtype=torch.float64),))
    assert result.units == 0
    with pytest.raises(nng.ArgumentError, match="the model has Linear"):
        _ = result.sign_similarity
    assert abs(result.kernel_alignment - 1) < 1e-12 and abs(result.representation_alignment - 1) < 1e-12


@pytest.mark.parametrize("kind", [Linearized, lambda m: Scaled(m, 7.0)])
def test_wrapped_models_know_their_start(kind):
    case = cases.build("inplace")
    wrapped = kind(case.model)
    with torch.no_grad():
        for p in wrapped.parameters():
            p.add_(0.5 * torch.randn_like(p))
    assert linearity(wrapped, None, case.loader) == linearity(wrapped.model, case.model, case.loader)
    assert linearity(wrapped, None, case.loader).sign_similarity < 1


def test_alpha_buys_linearity():
    torch.manual_seed(0)
    model = Net().double()
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    found = []
    for alpha in (1.0, 100.0):
        scaled = Scaled(model, alpha)
        optimizer = torch.optim.SGD(scaled.parameters(), lr=scaled.learning_rate(0.1))
        for _ in range(200):
            optimizer.zero_grad()
            (scaled(x) - y).square().mean().backward()
            optimizer.step()
        found.append(linearity(scaled, None, [(x, y)]))
    hasty, lazy = found
    assert lazy.sign_similarity > 0.97 and lazy.kernel_alignment > 0.99 and lazy.representation_alignment > 0.99
    assert hasty.sign_similarity < lazy.sign_similarity and hasty.kernel_alignment < lazy.kernel_alignment - 0.05


def test_nothing_is_left_on_the_model():
    case = cases.build("residual")
    linearity(case.model, copy.deepcopy(case.model), case.loader)
    assert all(p.grad is None for p in case.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


def test_errors():
    case = cases.build("mlp")
    with pytest.raises(nng.ArgumentError, match="reference"):
        linearity(case.model, None, case.loader)
    with pytest.raises(nng.ArgumentError, match="layer"):
        linearity(case.model, case.model, case.loader, layer="9")
    with pytest.raises(nng.StructureError, match="activations"):
        linearity(
            nn.Sequential(nn.Linear(4, 3), nn.ReLU()).double(),
            nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double(),
            case.loader,
        )
    with pytest.raises(nng.ModeError, match="eval"):
        linearity(cases.build("batch-norm").model.train(), cases.build("batch-norm").model, case.loader)
    with pytest.raises(nng.LoaderError, match="empty"):
        linearity(case.model, case.model, [])


class TimeFirst(nn.Module):
    """Turns ``(n, t, p)`` into ``(t, n, p)`` before its last map."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x).relu().transpose(0, 1)).mean(0)


@pytest.mark.parametrize("positions", [4, 5, 6])
def test_the_examples_are_found_among_axes_of_one_length(positions):
    torch.manual_seed(0)
    model = TimeFirst().double()
    now, x = moved(model, 0.5), torch.randn(5, positions, 3, dtype=torch.float64)
    rows = [m.a(x).relu().flatten(1).detach() for m in (now, model)]
    k, k0 = (r @ r.T for r in rows)
    truth = float((k * k0).sum() / (k.norm() * k0.norm()))
    assert abs(linearity(now, model, (x,)).representation_alignment - truth) < 1e-12
    square = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)).double()
    same = linearity(square, square, (torch.randn(5, 5, dtype=torch.float64),))
    assert abs(same.representation_alignment - 1) < 1e-12
    one = linearity(model, model, (x[:1, :1],))  # a batch of one example with one position: either axis is right
    assert abs(one.representation_alignment - 1) < 1e-12
