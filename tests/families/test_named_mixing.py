"""Examples with a name: outputs that depend on the inputs of other examples, seen by gradients or not."""

import pytest
import torch

import nngeom as nng
from nngeom.pullback.separate import interleaved

from .named import Model, f64, inputs, jacobian_holds, truth

X, TOKENS = inputs(6), torch.randint(0, 4, (6, 3), generator=torch.Generator().manual_seed(0))


def embedded(m, tokens):
    return torch.nn.functional.one_hot(tokens, 4).to(m.a.weight.dtype).cumsum(1).mean(1)


def detached_largest(m, x):
    h = m.a(x)
    return m.b((h / h.abs().max().detach()).tanh())


def detached_mean(m, x):
    h = m.a(x)
    return m.b((h - h.mean(0).detach()).tanh())


def similarities(m, x, tokens):
    """Images beside texts: what a text has to do with other images, no gradient in an input tells."""
    return m.a(x) @ m.a(embedded(m, tokens)).T


MIXED = {
    "divided by the largest input": lambda m, x: m.b(m.a(x / x.detach().abs().max()).tanh()),
    "divided by the largest unit": detached_largest,
    "less the mean": detached_mean,
    "ranks": lambda m, x: m.b(m.a(x).tanh() * x[:, :1].argsort(0).argsort(0)),
    "counted signs": lambda m, x: m.b(m.a(x).tanh()) * (x[:, :1] > 0).sum(),
    "real numbers as tokens": lambda m, x: m.b(m.a(x) + m.a(embedded(m, (x[:, :3] > 0).long()).mean(0))),
    "similarities": similarities,
    "similarities, normalised": lambda m, x, t: m.b(m.a(x)) + similarities(m, x, t).softmax(1)[:, :1],
    "the mean of tokens": lambda m, x, t: m.b(m.a(x) + m.a(embedded(m, t).mean(0))),
    "the number of tokens": lambda m, x, t: m.b(m.a(x).tanh()) * (t == 1).sum(),
    "a mask of all tokens": lambda m, x, t: m.b(m.a(x).tanh() * (t == 1).any(0).sum()),
}
MEASURES = {
    "jacobian": lambda model, batch: nng.Jacobian(model, [batch], function=model),
    "kernel": lambda model, batch: nng.GramMatrix(model, [batch], nng.FMatDiag, function=model),
    "fisher": lambda model, batch: nng.FIM(model, [batch], nng.PMatKFAC, function=model),
    "implicit": lambda model, batch: nng.FIM(model, [batch], nng.PMatImplicit, function=model).trace(),
}


class Two(Model):
    """A model of images, or of images beside texts."""

    def forward(self, *given):
        return self.function(self, *given)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", MIXED)
def test_what_depends_on_other_examples_is_refused(name, measure):
    mixed = MIXED[name]
    batch = (X, TOKENS) if mixed.__code__.co_argcount == 3 else (X,)
    with pytest.raises(nng.CoverageError, match="mixes"):
        MEASURES[measure](Two(mixed), batch)


@pytest.mark.parametrize("measure", MEASURES)
def test_opposites_and_neighbours_of_tokens_are_in_different_halves(measure):
    """Where the graph places all uses, halves alone are asked."""
    for reach in (1, 2, 4):
        mixed = lambda m, t, reach=reach: m.b(m.a(embedded(m, t + t[torch.arange(len(t)) ^ reach]) / 2).tanh())
        tokens = torch.randint(0, 2, (8, 3), generator=torch.Generator().manual_seed(1))
        with pytest.raises(nng.CoverageError, match="mixes"):
            MEASURES[measure](Two(mixed), (tokens,))


def pairings(n):
    """Which example each is mixed with: digits exchanged, opposites, shifts."""
    yield from ([j ^ mask if j ^ mask < n else j for j in range(n)] for mask in range(1, n))
    yield list(reversed(range(n)))
    yield from ([(j + shift) % n for j in range(n)] for shift in range(1, n))


def test_no_usual_pairing_is_within_the_halves_alone():
    for n in range(6, 80):
        half = {j: k for k, places in enumerate(interleaved(n)) for j in places}
        assert sorted(half) == list(range(n)) and sum(half.values()) == (n + 1) // 2
        for other in pairings(n):
            assert sum(j != other[j] for j in half) < n // 2 or any(half[j] != half[other[j]] for j in half), (n, other)


def test_mixed_behind_a_head_of_zeros():
    """Outputs are zero, and show nothing; gradients of the head do."""
    model = Two(lambda m, t: m.b(m.a(embedded(m, t + t[torch.arange(len(t)) ^ 1]) / 2).tanh()))
    torch.nn.init.zeros_(model.b.weight)
    torch.nn.init.zeros_(model.b.bias)
    with pytest.raises(nng.CoverageError, match="mixes"):
        nng.Jacobian(model, [(torch.randint(0, 2, (8, 3), generator=torch.Generator().manual_seed(1)),)])


class Attending(torch.nn.Module):
    """Over equal tokens the biases of keys have gradients that cancel: rounding is left."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.b = (torch.nn.Linear(4, c, dtype=f64) for c in (4, 4, 4, 3))

    def forward(self, x):
        return self.b(((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)).mean(1))


@pytest.mark.parametrize("dtype, tolerance", [(f64, 1e-6), (torch.float32, 1e-3)])
def test_gradients_that_cancel_are_not_mixed(dtype, tolerance):
    """Of a batch of equal examples, whose outputs show nothing."""
    model, x = Attending().to(dtype), inputs(1, 3, 4).expand(5, 3, 4).to(dtype)
    jacobian = nng.Jacobian(model, [x]).tensor
    rows = truth(model, x).rows
    assert float((jacobian - rows).norm() / rows.norm()) < tolerance
    assert nng.FIM(model, [x], nng.PMatKFAC).examples == 5


def by_place(m, x):
    return m.b(m.a(x).tanh() + torch.eye(5, dtype=f64)[torch.arange(len(x)) % 5])


@pytest.mark.parametrize("constant", [by_place, lambda m, x: m.b(m.a(x).tanh()) / len(x)])
def test_constants_may_depend_on_the_place_and_the_number_of_examples(constant):
    model = Model(constant)
    assert nng.FIM(model, [X], nng.PMatDense).trace() > 0
    jacobian_holds(model, X)
