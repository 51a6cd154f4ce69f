"""Models that torch's forward mode or second derivatives fail on: explicit rows, or the errors of the model."""

import pytest
import reference
import torch
from small import Function, model_of, normal
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nngeom as nng

f64 = torch.float64


NO_TANGENTS = {
    "no forward mode, no second derivative": (
        lambda: model_of(nn.EmbeddingBag(6, 4, mode="max"), nn.Tanh(), nn.Linear(4, 3)),
        lambda: torch.randint(0, 6, (5, 3)),
    ),
    "activations computed again": (
        lambda: Function(
            lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False).tanh()), a=nn.Linear(4, 5), b=nn.Linear(5, 3)
        ).double(),
        lambda: normal(5, 4),
    ),
    "channels-last group norm": (
        lambda: model_of(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
        lambda: normal(5, 2, 3, 3).to(memory_format=torch.channels_last),
    ),
}


@pytest.mark.parametrize("name", NO_TANGENTS)
def test_products_where_forward_mode_fails(name):
    """torch's forward mode lacks some operations and fails on others; products then are taken from explicit rows."""
    make, draw = NO_TANGENTS[name]
    model, x = make(), draw()
    y = torch.zeros(len(x), dtype=torch.long)
    m = nng.FIM(model, [(x[:2],), (x[2:],)], nng.PMatImplicit)
    torch.testing.assert_close(m.to_dense(), reference.fisher(model, x), rtol=1e-8, atol=1e-12)
    implicit, dense = (
        nng.GradientCovariance(model, [(x[:2], y[:2]), (x[2:], y[2:])], k, loss="cross_entropy")
        for k in (nng.PMatImplicit, nng.PMatDense)
    )
    torch.testing.assert_close(implicit.to_dense(), dense.to_dense(), rtol=1e-8, atol=1e-12)


def test_maps_on_channels_last_group_norm():
    """torch's forward mode of group norm fails on channels-last tensors: double backward instead."""
    make, draw = NO_TANGENTS["channels-last group norm"]
    model, x = make(), draw()
    v = nng.PVector.randn(nng.LayerCollection.from_model(model), dtype=f64)
    a, b = (nng.Jacobian(model, [x], kind).mv(v).flat() for kind in (nng.PushForwardImplicit, nng.PushForwardDense))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    a, b = (
        nng.GramMatrix(model, [x], kind).mv(nng.FVector(torch.ones(3, 5, dtype=f64))).flat()
        for kind in (nng.FMatImplicit, nng.FMatDense)
    )
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_products_keep_the_errors_of_the_model():
    def f(m, x):
        if bool((x > 50).any()):
            raise RuntimeError("no numbers above 50")
        return m.l(x)

    x = normal(4, 4)
    m = nng.FIM(Function(f, l=nn.Linear(4, 3)).double(), [x], nng.PMatImplicit)
    x += 100
    with pytest.raises(RuntimeError, match="above 50"):
        m.mv(nng.PVector.randn(m.layer_collection, dtype=f64))


class Bags(nn.Module):
    """Bags of embeddings in every form, summed: padded means, weighted sums, bags by their starts; ``lookups``: the
    same by indexing.
    """

    def __init__(self):
        super().__init__()
        self.lookups = False
        self.table, self.head = nn.Parameter(torch.randn(6, 4, dtype=f64)), nn.Linear(4, 3, dtype=f64)
        self.mean = nn.EmbeddingBag(6, 4, padding_idx=2, dtype=f64)

    def forward(self, x):
        weights, starts = (
            torch.linspace(0.5, 1.5, x.shape[1], dtype=f64).expand(x.shape),
            torch.arange(len(x)) * x.shape[1],
        )
        if self.lookups:
            kept = (x != 2).unsqueeze(2)
            means = (self.mean.weight[x] * kept).sum(1) / kept.sum(1).clamp_min(1)
            return self.head((means + (self.table[x] * (weights + 1).unsqueeze(2)).sum(1)).tanh())
        whole = self.mean(x) + F.embedding_bag(x, self.table, mode="sum", per_sample_weights=weights)
        return self.head((whole + F.embedding_bag(x.flatten(), self.table, starts, mode="sum")).tanh())


@pytest.fixture
def bags():
    """A model of bags, inputs, labels, and the Jacobian."""
    model, x = Bags(), torch.randint(0, 6, (4, 3))
    return model, x, torch.arange(4) % 3, reference.jacobian(model, x)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_bags_are_the_lookups_they_stand_for(bags):
    model, x, _, j = bags
    model.lookups = True
    close(reference.jacobian(model, x), j)


def test_maps_of_bags_of_embeddings(bags):
    model, x, _, j = bags
    v = nng.PVector.randn(nng.LayerCollection.from_model(model), dtype=f64)
    close(nng.Jacobian(model, [x], nng.PushForwardImplicit).mv(v).tensor, j @ v.flat())


def test_hessians_of_bags_of_embeddings(bags):
    model, x, y, _ = bags
    h = nng.Hessian(model, [(x, y)], nng.PMatDense, loss="cross_entropy").to_dense()
    model.lookups = True
    close(h, reference.hessian(model, x, y, F.cross_entropy))


def test_kernels_of_bags_of_embeddings_are_differentiable():
    plain, x = nn.Sequential(nn.EmbeddingBag(6, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randint(0, 6, (4, 3))
    k = nng.GramMatrix(plain, [x], differentiable=True)
    close(k.to_dense(), nng.GramMatrix(plain, [x]).to_dense())
    grads = torch.autograd.grad(k.trace(), list(plain.parameters()), allow_unused=True)
    table = plain[0].weight
    with torch.no_grad():
        ends = []
        for step in (1e-5, -2e-5):
            table[x[0, 0], 1] += step
            ends.append(nng.GramMatrix(plain, [x]).trace())
    torch.testing.assert_close(grads[0][x[0, 0], 1], (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-8)
