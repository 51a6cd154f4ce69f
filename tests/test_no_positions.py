"""Layers that are used at no positions at all in a batch: sequences without steps, groups without members."""

from __future__ import annotations

import pytest
import reference
import torch
from cases import FUNCTION_SPACE, PARAMETER_SPACE, representation
from torch import nn

import nngeom as nng

f64 = torch.float64


class Looked(nn.Module):
    """A table, looked up with the signs of the inputs."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2, 3, dtype=f64)

    def forward(self, x):
        return self.table((x[..., 0] > 0).long())


class Pooled(nn.Module):
    """The sum over positions of one layer, and a head."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(3, 2, dtype=f64)

    def forward(self, x):
        return self.head(self.layer(x).sum(1) + x.sum((1, 2)).unsqueeze(-1))


LAYERS = {
    "linear": lambda: nn.Linear(4, 3, dtype=f64),
    "table": Looked,
    "norm": lambda: nn.Sequential(nn.Linear(4, 3, dtype=f64), nn.LayerNorm(3, dtype=f64)),
}
STEPS = {"none": (0,), "none at first": (0, 3), "none later": (3, 0)}


def case(layer, steps):
    torch.manual_seed(0)
    model = Pooled(LAYERS[layer]())
    batches = [(torch.randn(2, t, 4, dtype=f64), torch.randint(0, 2, (2,))) for t in STEPS[steps]]
    rows = torch.cat([reference.jacobian(model, x) for x, _ in batches], 1)
    return model, batches, rows


def close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9 * float(y.abs().max()))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", FUNCTION_SPACE)
def test_kernels(kind, layer, steps):
    model, batches, rows = case(layer, steps)
    exact = torch.einsum("knd,lmd->knlm", rows, rows)
    close(nng.GramMatrix(model, batches, FUNCTION_SPACE[kind]).trace(), torch.einsum("knkn->", exact))
    layers = nng.GramMatrices(model, batches)
    close(sum(k.tensor for k in layers.values()), exact)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", PARAMETER_SPACE)
def test_matrices(name, layer, steps):
    model, batches, rows = case(layer, steps)
    inputs = [(x,) for x, _ in batches]
    m = nng.FIM(model, inputs, representation(name, model), likelihood="gaussian")
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    assert torch.isfinite(m.mv(v).flat()).all()
    if name in ("dense", "implicit", "low-rank"):
        flat = rows.flatten(0, 1)
        close(m.to_dense(), flat.T @ flat / rows.shape[1])
