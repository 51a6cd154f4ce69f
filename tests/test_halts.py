"""Backward passes halted at the waists of a graph: the same kernels, fewer gradients at once."""

import pytest
import reference
import torch
from cases import CASES, build
from torch import nn

import nngeom as nng
from nngeom.capture.network import Network
from nngeom.capture.recorder import record
from nngeom.pullback import backward, captured_pass, layer_by_layer
from nngeom.pullback.halts import stages
from nngeom.pullback.proofs import forget
from nngeom.sweep.sweep import Sweep


@pytest.fixture
def halting(monkeypatch):
    """Every waist is one, every cotangent goes by itself, rows are formed wherever they are smaller; the routes of all
    kernels.
    """
    monkeypatch.setattr(layer_by_layer, "STAGE_BYTES", 0)
    monkeypatch.setattr(layer_by_layer, "SMALLER", 1)
    monkeypatch.setattr(backward, "LOOP_BYTES", 0)
    monkeypatch.setattr(backward, "PRODUCT_BYTES", 0)
    routes = []
    route = captured_pass.Pass._route

    def watched(self, count):
        routes.append(route(self, count))
        return routes[-1]

    monkeypatch.setattr(captured_pass.Pass, "_route", watched)
    return routes


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def kernel(model, inputs):
    j = reference.jacobian(model, inputs)
    return torch.einsum("knd,lmd->knlm", j, j)


@pytest.mark.parametrize("name", CASES)
def test_kernels_of_halted_passes(halting, name):
    case = build(name, sizes=(5,))
    expected = kernel(case.model, case.inputs)
    for _ in range(2):  # proved, and remembered
        close(nng.GramMatrix(case.model, case.loader).tensor, expected)
    close(nng.GramMatrix(case.model, case.loader, nng.FMatBlockDiag).tensor, torch.einsum("knkm->knm", expected))
    layers = nng.GramMatrices(case.model, case.loader)
    close(sum(k.tensor for k in layers.values()), expected)
    assert halting


def test_passes_were_halted(halting):
    """The zoo holds what halting is for: chains, streams with branches, uses of one parameter on both sides of a
    waist.
    """
    longest = {}
    for name in ("mlp", "residual", "transformer", "reused"):
        case = build(name, sizes=(5,))
        nng.GramMatrix(case.model, case.loader)
        longest[name] = max(len(route) for route in halting)
        halting.clear()
    assert all(count > 1 for count in longest.values()), longest


class Hooked(nn.Module):
    """A stream with branches; a hook changes the gradient of the stream between two of them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.factor = 2.0

    def forward(self, x):
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = x + layer(x.tanh())
            if self.factor != 1 and layer is self.layers[2]:
                self.hook(x)
        return x

    def hook(self, x):
        x.register_hook(lambda g: self.factor * g)


class Hidden(Hooked):
    def hook(self, x):
        with torch._C.DisableTorchFunction():  # no function mode sees it
            super().hook(x)


@pytest.mark.parametrize("first", [1.0, 2.0])
def test_hooks_on_gradients_run_once(halting, first):
    torch.manual_seed(0)
    model, x = Hooked().double(), torch.randn(5, 6).double()
    for model.factor in (first, 3.0 - first):
        halting.clear()
        close(nng.GramMatrix(model, [(x, None)]).tensor, kernel(model, x))
        assert (len(halting[-1]) > 1) == (model.factor == 1)


def test_hooks_that_nobody_saw_are_found_out(halting):
    torch.manual_seed(0)
    model, x = Hidden().double(), torch.randn(5, 6).double()
    close(nng.GramMatrix(model, [(x, None)]).tensor, kernel(model, x))
    assert {len(route) for route in halting} == {1}


class Passed(torch.autograd.Function):
    """The identity; its gradient depends on how often it ran."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        Passed.calls += 1
        return g


def test_nothing_runs_more_often_than_in_a_whole_pass(halting):
    """Every stretch is gone through once a cotangent."""
    torch.manual_seed(0)

    class Model(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = layer(Passed.apply(x))
            return x

    model, x = (
        Model(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double(),
        torch.randn(5, 4).double(),
    )
    nng.GramMatrix(model, [(x, None)])
    Passed.calls = 0
    nng.GramMatrix(model, [(x, None)])
    assert len(halting[-1]) > 1
    assert (
        Passed.calls == (3 + 2) * 4
    )  # four lie between the outputs and the first layer; of a custom function, places are asked


def turns(model, most):
    """The turns of every stage, for uses of one byte each."""
    seen = record(Network.build(model, None, None), torch.randn(5, 4))
    return [stage.turns for stage in stages(seen.outputs, seen.uses, [1] * len(seen.uses), most)]


def test_a_chain_halts_at_every_layer():
    chain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    assert turns(chain, 1) == [[[2]], [[1]], [[0]]]
    assert turns(chain, 2) == [[[2, 1]], [[0]]]
    assert turns(chain, 3) == [[[0, 1, 2]]]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def test_a_stream_halts_between_blocks_and_what_is_near_comes_first():
    assert turns(nn.Sequential(nn.Linear(4, 4), Block(), Block()), 1) == [[[6], [5, 4]], [[3], [2, 1, 0]]]


def test_a_budget_too_small_for_all_gradients_is_enough_for_stages(monkeypatch):
    """What is held at once decides: the batch is not run in parts."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *[m for _ in range(12) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())], nn.Flatten(), nn.Linear(8 * 144, 8)
    ).double()
    x = torch.randn(12, 8, 12, 12).double()
    whole = nng.GramMatrix(model, [(x, None)])
    forget(model)
    monkeypatch.setattr(layer_by_layer, "STAGE_BYTES", 2**20)
    monkeypatch.setattr(Sweep, "_parts", None)
    some = nng.GramMatrix(model, [(x, None)], memory_budget=2**23)  # gradients of all layers take 10 MiB
    close(some.tensor, whole.tensor, 1e-10)
