"""Collections and vectors."""

import pytest
import torch
from cases import build
from torch import nn
from torch.nn.utils import parameters_to_vector

import nngeom as nng

f64 = torch.float64


def test_selection_by_name_glob_module_and_predicate():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2))
    select = lambda **k: nng.LayerCollection.from_model(model, **k).names
    every = ("0.0.weight", "0.0.bias", "1.weight", "1.bias")
    assert select() == every
    assert select(include="0") == select(include="0.*") == select(include=model[0]) == every[:2]
    assert select(include="1.weight") == select(include=lambda name, p: p.shape == (2, 4)) == every[2:3]
    assert select(exclude="*.bias") == select(include=lambda name: name.endswith("weight")) == every[::2]
    assert select(include=["0", "1.bias"], exclude=model[0][0]) == every[3:]


def test_order_sizes_and_layers():
    model = build("conv2d").model
    lc = nng.LayerCollection.from_model(model)
    assert torch.equal(nng.PVector.from_model(model).flat(), parameters_to_vector(model.parameters()))
    assert lc.numel == sum(p.numel() for p in model.parameters()) and len(lc) == 2
    assert lc.by_layer() == {"body.0": ("body.0.weight", "body.0.bias")}
    bare = nng.LayerCollection.from_model(build("bare").model)
    assert bare.layers == bare.names
    assert len(set(nng.LayerCollection.from_model(nn.Linear(2, 2)).layers)) == 1


def test_equal_collections_of_two_instances():
    a, b = build("mlp"), build("mlp")
    fisher = nng.FIM(a.model, a.loader)
    v = nng.PVector.from_model(b.model)
    assert fisher.layer_collection == v.layer_collection
    assert fisher.mv(v).shape == v.shape


def test_vectors_read_and_write():
    model = build("mlp").model
    lc = nng.LayerCollection.from_model(model)
    v = nng.PVector.from_model(model)
    assert set(v.to_dict()) == set(lc.names) and v["0.weight"].shape == (5, 4)
    torch.testing.assert_close(nng.PVector.from_dict(lc, v.to_dict()).flat(), v.flat())
    model(torch.randn(2, 4, dtype=f64)).sum().backward()
    g = nng.PVector.from_grad(model)
    torch.testing.assert_close(g["2.bias"], model[2].bias.grad)
    g.add_to(model, alpha=-0.5)
    torch.testing.assert_close(nng.PVector.from_model(model).flat(), (v - 0.5 * g).flat())
    v.copy_to(model)
    assert torch.equal(nng.PVector.from_model(model).flat(), v.flat())
    with pytest.raises(nng.CollectionError, match="not in the collection"):
        nng.PVector.from_dict(lc, {**v.to_dict(), "extra": torch.zeros(1)})


def test_vector_algebra_with_batches():
    lc = nng.LayerCollection.from_model(build("mlp").model)
    generator = torch.Generator().manual_seed(0)
    u, v = (nng.PVector.randn(lc, 3, 2, generator=generator, dtype=f64) for _ in range(2))
    assert u.batch_shape == (3, 2) and u["2.weight"].shape == (3, 2, 3, 5)
    torch.testing.assert_close((2 * u - v / 3 + (-u)).flat(), 2 * u.flat() - v.flat() / 3 - u.flat())
    torch.testing.assert_close(u.dot(v), (u.flat() * v.flat()).sum(-1))
    torch.testing.assert_close((u * u.norm()).flat(), u.flat() * u.flat().norm(dim=-1, keepdim=True))
    torch.testing.assert_close(sum([u, v]).flat(), (u + v).flat())
    assert u.clone().flat() is not u.flat() and u.to(torch.float32).dtype == torch.float32
    zero = nng.PVector.zeros(lc, 4)
    assert zero.shape == (4, lc.numel) and zero.norm(1).sum() == 0


def test_function_vectors():
    f, g = (nng.FVector(torch.randn(3, 5, dtype=f64)) for _ in range(2))
    torch.testing.assert_close((2 * f - g).tensor, 2 * f.tensor - g.tensor)
    torch.testing.assert_close(f.dot(g), (f.tensor * g.tensor).sum())
    assert f.flat().shape == (15,) and torch.equal(f.flat()[5:10], f.tensor[1])
    with pytest.raises(nng.ArgumentError, match=r"\(\*batch, c, n\)"):
        nng.FVector(torch.zeros(3))
    with pytest.raises(nng.ArgumentError, match="do not fit"):
        f + nng.FVector(torch.zeros(3, 4))
