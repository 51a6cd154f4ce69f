"""Every parameter counts, once, with all its uses: a use that is missed is a wrong number without an error."""

import pytest
import reference
import torch
from cases import Unseen, build
from small import Function, normal, require_fisher
from torch import nn
from torch.nn import functional as F

import nngeom as nng

f64 = torch.float64


@pytest.mark.parametrize(
    "name", ["reused", "tied", "language-model", "bare", "transformer", "sequence", "weight-norm", "embedding"]
)
def test_every_use_counts(name):
    case = build(name)
    require_fisher(case.model, case.inputs)


def test_tied_weights_count_once():
    case = build("language-model")
    lc = nng.LayerCollection.from_model(case.model)
    assert "head.weight" not in lc and lc.numel == sum(p.numel() for p in case.model.parameters())
    by_alias = nng.LayerCollection.from_model(case.model, include="head.weight")
    assert by_alias.names == ("embed.weight",)


def test_layers_behind_constants_and_second_inputs():
    def f(m, x):
        return m.out(
            torch.tanh(
                m.first(x) + m.constant(torch.ones(len(x), 2, dtype=x.dtype)) + m.table(torch.arange(len(x)) % 3)
            )
        )

    model = Function(
        f, first=nn.Linear(4, 3), constant=nn.Linear(2, 3), table=nn.Embedding(3, 3), out=nn.Linear(3, 3)
    ).double()
    x = normal(6, 4)
    j = torch.cat([reference.jacobian(model, x[:1])] * 1, 1)
    assert j.shape[1] == 1
    lc = nng.LayerCollection.from_model(model)
    v = nng.PVector.randn(lc, dtype=f64)
    dense = nng.FIM(model, [x], nng.PMatDense, likelihood="gaussian")
    h = 1e-5
    before, minus = nng.PVector.from_model(model), None
    (before + h * v).copy_to(model)
    plus = model(x).detach()
    (before - h * v).copy_to(model)
    minus = model(x).detach()
    before.copy_to(model)
    torch.testing.assert_close(dense.vTMv(v), ((plus - minus) / (2 * h)).square().sum() / 6, rtol=1e-6, atol=1e-9)


def test_functional_use_of_the_parameters_of_a_layer():
    model = Function(lambda m, x: F.linear(torch.tanh(x), m.inner.weight, m.inner.bias), inner=nn.Linear(4, 3).double())
    require_fisher(model, normal(6, 4))


def test_functions_that_do_not_call_the_model():
    inner = nn.Linear(4, 3).double()
    model = Function(lambda m, x: m.inner(x), inner=inner)
    outside = nng.FIM(model, [normal(6, 4)], nng.PMatDense, function=lambda x: x @ inner.weight.T)
    assert outside.trace() > 0


def test_parameters_of_containers():
    class Container(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.inner = nn.Parameter(torch.randn(3)), nn.Sequential(nn.Linear(4, 3))

        def forward(self, x):
            return torch.tanh(self.inner(x)) * self.own

    require_fisher(Container().double(), normal(6, 4))


def test_another_forward_under_a_familiar_name():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(normal(3, 4)), nn.Parameter(normal(3))

        def forward(self, x):
            return torch.sin(x @ self.weight.exp().T) + self.bias

    require_fisher(Linear(), normal(6, 4))


def test_spectral_norm_differentiates_its_own_parameter():
    model = (
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))
        .double()
        .eval()
    )
    require_fisher(model, normal(6, 4))


def test_frozen_parameters_are_left_out():
    case = build("frozen")
    lc = nng.LayerCollection.from_model(case.model)
    assert lc.names == ("2.weight", "2.bias") and lc.numel == 15


@pytest.fixture
def headed():
    def f(m, x):
        with torch.no_grad():
            h = torch.tanh(m.body(x))
        return m.head(h)

    return Function(f, body=nn.Linear(4, 3), head=nn.Linear(3, 3)).double()


def test_the_head_alone_of_a_backbone_without_gradients(headed):
    lc = nng.LayerCollection.from_model(headed, include="head")
    m = nng.FIM(headed, [normal(5, 4)], nng.PMatEKFAC, layer_collection=lc)
    assert m.shape == (12, 12) and m.trace() > 0


def test_a_backbone_without_gradients_has_zeros(headed):
    whole = nng.FIM(headed, [normal(5, 4)], nng.PMatDense)
    assert whole.diag()["body.weight"].abs().sum() == 0


def test_integer_inputs_and_keyword_arguments():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 3)

        def forward(self, ids, scale=1.0):
            return torch.nn.functional.linear(
                input=ids.to(self.l.weight.dtype) * scale, weight=self.l.weight, bias=self.l.bias
            )

    require_fisher(Net().double(), torch.randint(0, 3, (6, 4)))


class Sorted(nn.Module):
    """Sorts its examples before a layer and puts them back behind it, as packing by length does."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        order = x.square().flatten(1).sum(1).argsort()
        inner = torch.tanh(self.inner(h[order]))
        return self.last(inner[order.argsort()]).flatten(1)


class ByBatchSize(nn.Module):
    """The same function by two routes; the one of larger batches uses a weight once more than can be seen."""

    def __init__(self, extra: bool):
        super().__init__()
        self.first, self.again, self.extra = nn.Linear(4, 4), nn.Linear(4, 3), extra

    def forward(self, x):
        h = torch.tanh(self.first(x))
        w = self.first.weight
        if self.extra and len(x) > 3:
            h = h + Unseen.apply(x, w)
        elif self.extra:
            h = h + F.linear(x, w)
        return self.again(h)


@pytest.mark.parametrize(("shape", "check"), [((7, 4), True), ((7, 7, 4), True), ((7, 2, 4), True), ((7, 7, 4), False)])
def test_a_model_that_sorts_its_examples(shape, check):
    """Without the check the order is proved only where shapes leave a choice."""
    torch.manual_seed(0)
    model, x = Sorted().double(), normal(*shape)
    torch.testing.assert_close(nng.Jacobian(model, [x], check=check).tensor, reference.jacobian(model, x))


@pytest.mark.parametrize("extra", [True, False])
def test_a_model_whose_route_depends_on_the_size_of_the_batch(extra):
    torch.manual_seed(0)
    model, x = ByBatchSize(extra).double(), normal(9, 4)
    torch.testing.assert_close(nng.Jacobian(model, [x]).tensor, reference.jacobian(model, x))
