"""Vectors entry by entry, batches of them, named tensors in their place, and norms of millions of entries."""

import math

import pytest
import torch
from cases import PARAMETER_SPACE, build, representation

import nngeom as nng

f64 = torch.float64


@pytest.fixture
def lc():
    return nng.LayerCollection.from_model(build("mlp").model)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_entry_by_entry(lc, batch):
    v, w = (nng.PVector.randn(lc, *batch, dtype=f64) for _ in range(2))
    torch.testing.assert_close(v @ w, (v.flat() * w.flat()).sum(-1))
    assert torch.equal(abs(v).flat(), v.flat().abs()) and torch.equal((v**2).flat(), v.flat() ** 2)
    torch.testing.assert_close((abs(v) ** torch.tensor(0.5)).flat(), v.flat().abs().sqrt())
    assert torch.equal(v.apply(torch.sigmoid).flat(), v.flat().sigmoid())


@pytest.mark.parametrize("combine", ["__add__", "__sub__", "__mul__", "dot"])
def test_batches_that_differ_are_named(lc, combine):
    for make in (lambda *b: nng.PVector.randn(lc, *b), lambda *b: nng.FVector(torch.randn(*b, 2, 3))):
        with pytest.raises(nng.ArgumentError, match=r"\(3,\) and \(5,\)"):
            getattr(make(3), combine)(make(5))
        one, each = getattr(make(), combine)(make(5)), getattr(make(1, 5), combine)(make(3, 1))
        batches = [tuple((x if isinstance(x, torch.Tensor) else x.tensor).shape) for x in (one, each)]
        assert batches[0][:1] == (5,) and batches[1][:2] == (3, 5)


def test_entry_by_entry_in_function_space():
    f, g = (nng.FVector(torch.randn(2, 3, 4, dtype=f64)) for _ in range(2))
    torch.testing.assert_close(f @ g, (f.tensor * g.tensor).sum((-2, -1)))
    assert torch.equal((abs(f) ** 2).tensor, f.tensor.square()) and torch.equal(
        f.apply(torch.exp).tensor, f.tensor.exp()
    )


def test_batches_are_sequences(lc):
    v = nng.PVector.randn(lc, 4, 2, dtype=f64)
    assert len(v) == 4 and torch.equal(v[1].flat(), v.flat()[1]) and torch.equal(v[1, 0].flat(), v.flat()[1, 0])
    assert torch.equal(v[1:3].flat(), v.flat()[1:3]) and torch.equal(v[..., 1].flat(), v.flat()[:, 1])
    assert torch.equal(v[torch.tensor([2, 0])].flat(), v.flat()[[2, 0]])
    assert torch.equal(v[v.norm() > 3].flat(), v.flat()[v.norm() > 3])
    assert torch.equal(v[None].flat(), v.flat()[None])
    assert [torch.equal(x.flat(), y) for x, y in zip(v, v.flat(), strict=True)] == [True] * 4
    assert v["0.weight"].shape == (4, 2, 5, 4)
    torch.testing.assert_close(sum(v).flat(), v.flat().sum(0))


def test_wrong_uses(lc):
    v = nng.PVector.randn(lc, 3, dtype=f64)
    for index in (5, (0, 1), "0.nothing", (0, ..., 0), 1.5):
        with pytest.raises(nng.NNGeomError, match=r"batch|no parameter"):
            v[index]
    with pytest.raises(nng.ArgumentTypeError, match="no length"):
        len(v[0])
    with pytest.raises(nng.ArgumentTypeError, match="the first is Tensor"):
        nng.PVector.from_flat(torch.zeros(lc.numel), lc)
    with pytest.raises(nng.ArgumentError, match="expected a tensor"):
        v.apply(lambda x: x.sum())
    with pytest.raises(nng.ArgumentTypeError, match="expected a number"):
        v**v
    for other in (0, 2.0, torch.ones(3)):
        with pytest.raises(nng.ArgumentTypeError, match="expected a PVector"):
            v @ other
    f = nng.FVector(torch.ones(2, 3))
    with pytest.raises(nng.ArgumentTypeError, match="expected an FVector"):
        f @ 2


@pytest.mark.parametrize("kind", PARAMETER_SPACE)
def test_named_tensors_in_place_of_a_vector(kind):
    case = build("conv2d")
    m = nng.FIM(case.model, case.loader, representation(kind, case.model))
    v = nng.PVector.randn(m.layer_collection, 2, dtype=f64)
    named = v.to_dict()
    assert torch.equal((m @ named).flat(), (m @ v).flat()) and torch.equal(m.vTMv(named), m.vTMv(v))
    assert torch.equal(m.solve(named, 10.0).flat(), m.solve(v, 10.0).flat())


def test_named_tensors_in_sums_products_and_maps(lc):
    case = build("mlp")
    v, w = (nng.PVector.randn(lc, dtype=f64) for _ in range(2))
    named = w.to_dict()
    for a, b in ((v + named, v + w), (named + v, v + w), (v - named, v - w), (v * named, v * w)):
        assert torch.equal(a.flat(), b.flat())
    assert torch.equal(v @ named, v @ w)
    for kind in (nng.PushForwardDense, nng.PushForwardImplicit):
        j = nng.Jacobian(case.model, case.loader, kind)
        assert torch.equal(j.mv(named).tensor, j.mv(w).tensor)
    basis = nng.FIM(case.model, case.loader).eigh()[1]
    assert torch.equal(basis.T.mv(named).flat(), basis.T.mv(w).flat())
    with pytest.raises(nng.CollectionError, match="no tensor for parameter"):
        v + {"0.weight": w["0.weight"]}


@pytest.mark.parametrize("p", [0, 1, 2, 3, math.inf, -math.inf, -1])
def test_norms_of_pieces(p):
    x = torch.randn(2, 2**17 + 5, dtype=f64)
    lc = nng.LayerCollection(("w",), ((x.shape[1],),), ("w",))
    torch.testing.assert_close(nng.PVector(lc, x).norm(p), torch.linalg.vector_norm(x, p, dim=-1), rtol=1e-12, atol=0)
    f = x.unflatten(-1, (1, -1))
    torch.testing.assert_close(nng.FVector(f).norm(p), torch.linalg.vector_norm(x, p, dim=-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_millions_of_entries(dtype):
    d = 30_000_000
    lc = nng.LayerCollection(("w",), ((d,),), ("w",))
    x = torch.full((d,), 0.1).to(dtype)
    expected = float(x[0].double()) * math.sqrt(d)
    tol = 1e-6 if dtype is torch.float32 else 4e-3
    assert abs(float(nng.PVector(lc, x).norm()) / expected - 1) < tol
    assert abs(float(nng.FVector(x.view(2, -1)).norm()) / expected - 1) < tol


def test_norms_of_pieces_have_a_gradient():
    x = torch.randn(2**16 + 3, dtype=f64)
    x[: 2**16] = 0
    x.requires_grad_()
    lc = nng.LayerCollection(("w",), ((len(x),),), ("w",))
    (gradient,) = torch.autograd.grad(nng.PVector(lc, x).norm(), x)
    torch.testing.assert_close(gradient, x.detach() / x.detach().norm())
