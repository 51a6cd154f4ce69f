"""What a measure remembers of a model, its modules, parameters and blocks, follows what the model is now."""

import pytest
import reference
import torch
from cases import CASES, build
from torch import nn

import nngeom as nng
from nngeom.core.draws import inner_products
from nngeom.pullback.backward import pull_back
from nngeom.pullback.batched import batched_gradients
from nngeom.space import walk
from nngeom.space.collection import LayerCollection
from nngeom.sweep.sweep import Policy


@pytest.mark.parametrize("name", CASES)
def test_a_walk_finds_what_torch_finds(name):
    model = build(name).model
    assert walk.named_parameters(model) == dict(model.named_parameters(remove_duplicate=False))
    assert walk.modules(model) == tuple(model.modules())
    assert [m for _, m in walk.named_modules(model)] == [m for _, m in model.named_modules(remove_duplicate=False)]


@pytest.mark.parametrize("name", CASES)
def test_what_is_in_its_place_needs_no_other_walk(name):
    model = build(name).model
    places = walk.Places(model)
    assert places.are_current() and places.parameters == walk.named_parameters(model)
    for p in model.parameters():
        p.data = p.data.clone()
    assert places.are_current()
    holder = next(m for m in places.modules if m._parameters)
    key, p = next((key, p) for key, p in holder._parameters.items() if p is not None)
    setattr(holder, key, nn.Parameter(p.detach().clone()))
    assert not places.are_current()
    setattr(holder, key, p)
    assert places.are_current()


class Renamed(nn.Sequential):
    """Names its modules itself."""

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        for name, m in super().named_modules(memo, prefix, remove_duplicate):
            yield name.replace("0", "first"), m


@pytest.mark.parametrize("model", [Renamed(nn.Linear(2, 2)), nn.Sequential(nn.Tanh(), Renamed(nn.Linear(2, 2)))])
def test_models_that_name_their_modules_themselves(model):
    found = walk.named_parameters(model)
    assert found == dict(model.named_parameters(remove_duplicate=False))
    assert any("first" in name for name in found)


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 2)).double()


MOVES = {
    "another module": lambda m: setattr(m, "3", nn.Linear(3, 2).double()),
    "a module more": lambda m: m.append(nn.Tanh()),
    "a module less": lambda m: m.pop(-1),
    "other names": lambda m: setattr(m, "_modules", {f"a{k}": x for k, x in m._modules.items()}),
    "a parameter less": lambda m: setattr(m[3], "bias", None),
    "one of equal number": lambda m: setattr(m[1], "scale", nn.Parameter(m[1].scale.detach().clone())),
    "names exchanged": lambda m: m[3]._parameters.update(bias=m[3].weight, weight=m[3].bias),
    "a parameter more": lambda m: m.register_parameter("more", nn.Parameter(torch.ones(1))),
}


@pytest.mark.parametrize("move", MOVES)
def test_what_left_its_place_is_seen(move):
    model = shared()
    model[1].register_parameter("scale", nn.Parameter(torch.ones(1, dtype=torch.float64)))
    places = walk.Places(model)
    assert places.are_current()
    MOVES[move](model)
    assert not places.are_current()


class Some(nn.Sequential):
    """Has other parameters at another time."""

    bare = False

    def named_parameters(self, *args, **options):
        return (
            (name, p) for name, p in super().named_parameters(*args, **options) if "bias" not in name or not self.bare
        )


def test_models_that_name_modules_or_parameters_are_walked_through_again():
    assert not walk.Places(nn.Sequential(Renamed(nn.Linear(2, 2)))).are_current()
    model, x = Some(nn.Linear(3, 2)).double(), torch.randn(4, 3, dtype=torch.float64)
    assert not walk.Places(model).are_current()
    m = nng.FIM(model, (x, None), nng.PMatImplicit)
    v = nng.PVector.randn(m.layer_collection)
    m.mv(v)
    model.bare = True
    with pytest.raises(nng.CollectionError, match="other parameters"):
        m.mv(v)


def test_a_policy_has_no_other_fields():
    assert Policy("a", watch=False).but(reuse=True) == Policy("a", watch=False, reuse=True)
    with pytest.raises(TypeError, match="no fields \\['wacht'\\]"):
        Policy().but(wacht=False)


def dense(model: nn.Module, x: torch.Tensor) -> None:
    """A measure twice is what is right, both times."""
    for _ in range(2):
        ours = nng.FIM(model, (x,), nng.PMatDense).to_dense()
        torch.testing.assert_close(ours, reference.fisher(model, x), rtol=1e-9, atol=1e-12)
        kfac = nng.FIM(model, (x,), nng.PMatKFAC)
        assert sum(layout.numel for layout in kfac.blocks) == ours.shape[0]


CHANGES = {
    "nothing": lambda m: None,
    "frozen": lambda m: m[0].weight.requires_grad_(False),
    "exchanged": lambda m: setattr(m, "3", nn.Linear(3, 4).double()),
    "tied": lambda m: setattr(m[3], "weight", nn.Parameter(m[0].weight[:2].detach().clone())),
    "added": lambda m: m.append(nn.Linear(len(m[3].bias), 5).double()),
    "without bias": lambda m: setattr(m[3], "bias", None),
    "new numbers": lambda m: m[0].weight.data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_measured_as_it_is(change):
    torch.manual_seed(0)
    model, x = shared(), torch.randn(4, 3, dtype=torch.float64)
    dense(model, x)
    CHANGES[change](model)
    dense(model, x)
    dense(model, x[:3])


def test_collections_and_parts_have_blocks_of_their_own():
    torch.manual_seed(0)
    model, x = shared(), torch.randn(4, 3, dtype=torch.float64)
    whole = nng.FIM(model, (x,), nng.PMatKFAC)
    some = LayerCollection.from_model(model, include="3.*")
    part = nng.FIM(model, (x,), nng.PMatKFAC, layer_collection=some)
    assert [layout.names for layout in part.blocks] == [("3.weight", "3.bias")] and part.shape == (8, 8)
    mixed = nng.FIM(model, (x,), nng.PMatMixed({"3.bias": nng.PMatDiag}, default=nng.PMatKFAC))
    assert ("3.weight", "3.bias") not in [layout.names for layout in mixed.blocks]
    again = nng.FIM(model, (x,), nng.PMatKFAC)
    assert list(again.blocks) == list(whole.blocks)
    torch.testing.assert_close(again.to_dense(), whole.to_dense(), rtol=0, atol=0)


def test_collections_are_those_of_before_while_nothing_changes():
    model = shared()
    parameters = walk.named_parameters(model)
    first = LayerCollection.whole(model, parameters)
    assert LayerCollection.whole(model, parameters) is first == LayerCollection.from_model(model)
    model[3].bias.requires_grad_(False)
    assert "3.bias" not in LayerCollection.whole(model, walk.named_parameters(model))
    with pytest.raises(nng.CollectionError):
        model.requires_grad_(False)
        LayerCollection.whole(model, walk.named_parameters(model))


@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients_are_those_of_one_after_the_other(create_graph):
    torch.manual_seed(0)
    model, x = shared(), torch.randn(4, 3, dtype=torch.float64)
    other = torch.zeros(2, requires_grad=True)
    out = model(x)
    v = torch.randn(5, *out.shape, dtype=torch.float64)
    inputs = [*model.parameters(), other]
    *found, unused = batched_gradients(out, inputs, v, create_graph=create_graph)
    assert unused is None and any(g.requires_grad for g in found) == create_graph
    for j, w in enumerate(v):
        expected = torch.autograd.grad(out, list(model.parameters()), w, retain_graph=True)
        for g, e in zip(found, expected):
            torch.testing.assert_close(g[j], e)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g if float(g.sum()) > -1e30 else g  # numbers of one cotangent


def test_what_cannot_be_mapped_is_pulled_back_one_by_one():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y, v = Once.apply(x), torch.randn(4, 3, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        batched_gradients(y, [x], v, create_graph=False)
    (g,) = pull_back(y, [x], [x.shape], v, retain=True, large=False)
    torch.testing.assert_close(g, 2 * v)
    with pytest.raises(RuntimeError):
        batched_gradients(y, [x], v[:, :2], create_graph=False)


@pytest.mark.parametrize("size", [3, 5000, 300_000])
def test_inner_products_of_many_rows(size):
    generator = torch.Generator().manual_seed(size)
    x, y = (torch.randn(3, size, generator=generator) + 1 for _ in range(2))
    expected = (x.double() * y.double()).sum(1)
    assert bool(((inner_products(x, y) - expected).abs() <= 2e-6 * (x * y).abs().double().sum(1)).all())
    several = inner_products(x.view(3, 1, -1), y.view(3, 1, -1))
    torch.testing.assert_close(several, inner_products(x, y), rtol=0, atol=0)
