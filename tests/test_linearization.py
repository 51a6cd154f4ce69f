"""Implicit products of models that keep parameters where forward mode does not find them."""

import threading

import pytest
import reference
import torch
from cases import Unseen
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.pmat.tangents import are_adjoint

f64 = torch.float64


class Net(nn.Module):
    """Two layers; ``way`` says how the first reaches its weight."""

    def __init__(self, way):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5, dtype=f64), nn.Linear(5, 3, dtype=f64)
        self.kept = [self.first.weight, self.first.bias]  # a plain list
        weight = self.first.weight
        self.closure = lambda x: F.linear(x, weight)
        self.way = way

    def forward(self, x):
        return self.second(self.way(self, x).tanh())


class Constant(Unseen):
    """The same with a backward pass that hides its operations from autograd."""

    @staticmethod
    def backward(ctx, g):
        x, w = (t.detach() for t in ctx.saved_tensors)
        return (g.detach() @ w).detach(), (g.detach().mT @ x).detach()


WAYS = {
    "plain": lambda net, x: net.first(x),
    "closure": lambda net, x: net.closure(x),
    "closure and module": lambda net, x: net.closure(x) + 0.5 * net.first(x),
    "list": lambda net, x: F.linear(x, *net.kept),
    "fused": lambda net, x: Unseen.apply(x, net.first.weight),
    "constant": lambda net, x: Constant.apply(x, net.first.weight),
}


@pytest.mark.parametrize("way", WAYS)
def test_products_are_right_wherever_parameters_are_kept(way):
    model, x = Net(WAYS[way]), torch.randn(6, 4, dtype=f64)
    expected = reference.fisher(model, x)
    implicit = nng.FIM(model, [x[:4], x[4:]], nng.PMatImplicit)
    torch.testing.assert_close(implicit.to_dense(), expected)


def test_products_of_scripted_models_are_right():
    model, x = (
        nn.Sequential(nn.Linear(4, 5, dtype=f64), nn.Tanh(), nn.Linear(5, 3, dtype=f64)),
        torch.randn(6, 4, dtype=f64),
    )
    expected = reference.fisher(model, x)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(nng.FIM(scripted, [x], nng.PMatImplicit).to_dense(), expected)


def test_products_of_a_branch_taken_later_are_right():
    model, x = Net(lambda net, x: net.closure(x) if (x[:, 0] > 9).all() else net.first(x)), torch.randn(6, 4, dtype=f64)
    x[3:, 0] = 10
    loader = [(x[:3],), (x[3:],)]
    expected = torch.stack([reference.fisher(model, b) for (b,) in loader]).mean(0)
    torch.testing.assert_close(nng.FIM(model, loader, nng.PMatImplicit).to_dense(), expected)


def test_a_branch_that_one_example_takes_for_all_is_refused():
    model, x = Net(lambda net, x: net.closure(x) if x[0, 0] > 9 else net.first(x)), torch.randn(6, 4, dtype=f64)
    x[3, 0] = 10
    with pytest.raises(nng.CoverageError, match="mixes"):
        nng.FIM(model, [(x[:3],), (x[3:],)], nng.PMatImplicit)


def test_products_are_asked_again_where_a_zero_answered():
    model, x = Net(WAYS["closure"]), torch.randn(6, 4, dtype=f64)
    weight = model.second.weight.detach().clone()
    model.second.weight.data.zero_()
    matrix = nng.FIM(model, [x], nng.PMatImplicit)
    torch.testing.assert_close(matrix.to_dense(), reference.fisher(model, x))
    model.second.weight.data.copy_(weight)
    torch.testing.assert_close(nng.FIM(model, [x], nng.PMatImplicit).to_dense(), reference.fisher(model, x))
    torch.testing.assert_close(matrix.to_dense(), reference.fisher(model, x))


def test_threads_share_a_model():
    model, x = Net(WAYS["plain"]), torch.randn(6, 4, dtype=f64)
    matrix = nng.FIM(model, [x], nng.PMatImplicit)
    v = nng.PVector.randn(matrix.layer_collection, dtype=f64)
    expected, found = matrix.mv(v).flat(), []
    work = lambda: found.extend([matrix.mv(v).flat() for _ in range(10)])
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(found) == 40
    for got in found:
        torch.testing.assert_close(got, expected)


def test_long_sums_in_float32_agree():
    """Inner products over tens of millions of float32 numbers of one sign, where plain sums lose four digits."""
    u, tangent = torch.full((2**25,), 0.1), torch.rand(2**25, generator=torch.Generator().manual_seed(0))
    pulled = torch.dot(u.double(), tangent.double()).to(torch.float32)[None]
    assert are_adjoint(u, tangent, pulled, torch.ones(1))
    assert not are_adjoint(u, tangent, 1.01 * pulled, torch.ones(1))
