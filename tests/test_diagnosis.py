"""What is said of a model: how its rows are known, and what its outputs depend on."""

import pytest
import torch
from cases import Unseen
from torch import nn

import nngeom as nng

f64 = torch.float64


class Net(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 5, dtype=f64), nn.Linear(5, 3, dtype=f64), act
        self.odd, self.idle = nn.Parameter(torch.ones(5, dtype=f64)), nn.Parameter(torch.ones(2, dtype=f64))

    def forward(self, x):
        return self.second(self.act(self, x, self.first(x)) / self.odd)


X = torch.randn(6, 4, dtype=f64)


def test_what_the_graph_tells_and_what_falls_back():
    d = nng.diagnose(Net(lambda net, x, h: h.tanh()), X)
    assert (d["first.weight"].rows, d["first.weight"].placed, d["first.weight"].right) == (
        "captured",
        "graph",
        "compared",
    )
    assert d["odd"].rows == "fallback" and "adapter" in d["odd"].complete
    assert d["idle"].rows == "unused"
    assert (
        all(d[name].change < 1e-12 for name in ("number of examples", "order", "repetition"))
        and 0 < d["dtype"].change < 1e-5
    )
    assert d["padding"].change is None
    assert "first.weight" in str(d) and "number of examples" in str(d)


def test_uses_that_nobody_saw_and_hooks():
    model = Net(lambda net, x, h: h + Unseen.apply(x, net.first.weight))
    model.second.weight.register_hook(lambda g: g)
    d = nng.diagnose(model, X)
    assert d["first.weight"].rows == "fallback" and "no known operation" in d["first.weight"].complete
    assert d["second.weight"].rows == "fallback" and "function on its gradient" in d["second.weight"].complete
    assert d["first.bias"].rows == "captured"


def test_examples_placed_by_data_are_asked_in_every_batch():
    d = nng.diagnose(Net(lambda net, x, h: h[x[:, 0].argsort()][x[:, 0].argsort().argsort()]), X)
    assert d["first.weight"].placed == "numbers, every batch" and d["second.weight"].placed == "graph"


def test_mixing_models_are_reported():
    d = nng.diagnose(Net(lambda net, x, h: h - h.mean(0)), X)
    assert d["number of examples"].change > 1e-3 and d["order"].change < 1e-12
    assert d["first.weight"].rows == "fallback"


class Scaled(torch.autograd.Function):
    """A product whose gradient in the weight depends on how many examples there are."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, len(g) * g.T @ x


MIXING = {
    "centred": lambda net, x, h: h - h.mean(0),
    "flipped": lambda net, x, h: h.flip(0),
    "as a graph": lambda net, x, h: (h @ h.mT).softmax(1) @ h,
}
FINE = {
    "plain": lambda net, x, h: h.tanh(),
    "sorted and back": lambda net, x, h: h[x[:, 0].argsort()].tanh()[x[:, 0].argsort().argsort()],
    "unseen": lambda net, x, h: h + Unseen.apply(x, net.first.weight),
}
MEASURES = {
    "jacobian": lambda model: nng.Jacobian(model, [X]),
    "kernel": lambda model: nng.GramMatrix(model, [X]),
    "fisher": lambda model: nng.FIM(model, [X], nng.PMatDense),
    "implicit": lambda model: nng.FIM(model, [X], nng.PMatImplicit),
    "hessian": lambda model: nng.Hessian(model, [(X, X[:, :3])], nng.PMatDense, loss="mse"),
}


@pytest.mark.parametrize("name", MIXING | FINE)
def test_measures_do_afterwards_what_is_said_of_them(name):
    """A diagnosis proves nothing for them that it has not asked."""
    model = Net((MIXING | FINE)[name])
    d = nng.diagnose(model, X)
    assert bool(d.refused) == (name in MIXING)
    for measure in MEASURES.values():
        if name in MIXING:
            assert d["number of examples"].change > 1e-3 and d.refused in str(d)
            with pytest.raises(nng.CoverageError):
                measure(model)
        else:
            measure(model)


def test_refusals_of_rows_are_told():
    d = nng.diagnose(Net(lambda net, x, h: Scaled.apply(x, net.first.weight).tanh()), X)
    assert "mixes" in d.refused
    d = nng.diagnose(Net(lambda net, x, h: h / 0), X)
    assert "NaN or infinity" in d.refused


def test_padding_that_matters():
    class Pooled(nn.Module):
        def __init__(self, masked):
            super().__init__()
            self.embed, self.head, self.masked = nn.Embedding(7, 4), nn.Linear(4, 3), masked

        def forward(self, input_ids, attention_mask):
            h = self.embed(input_ids)
            if self.masked:
                h = h * attention_mask.unsqueeze(-1)
                return self.head(h.sum(1) / attention_mask.sum(1, keepdim=True))
            return self.head(h.mean(1))

    batch = {"input_ids": torch.randint(1, 7, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    assert nng.diagnose(Pooled(True), batch)["padding"].change < 1e-5
    assert nng.diagnose(Pooled(False), batch)["padding"].change > 1e-3


def test_random_models_raise():
    with pytest.raises(nng.ModeError):
        nng.diagnose(Net(lambda net, x, h: h + torch.randn_like(h)), X)
