"""Mixtures of experts: weights of three axes used by ``bmm``, ``einsum``, products and indexing, against autograd."""

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng

f64 = torch.float64
E, I, H = 3, 4, 5  # experts, inputs, hidden units


class Experts(nn.Module):
    """Every expert sees every example; a gate mixes them. ``first``, ``second``: how their weights are used."""

    def __init__(self, first, second, shapes):
        super().__init__()
        self.first, self.second = first, second
        self.up, self.down = (nn.Parameter(torch.randn(shape, dtype=f64)) for shape in shapes)
        self.shift, self.gate = nn.Parameter(torch.randn(E, 1, H, dtype=f64)), nn.Linear(I, E).double()

    def forward(self, x):
        hidden = torch.tanh(self.first(x.expand(E, *x.shape), self.up, self.shift))  # [e n h]
        return torch.einsum("eno,ne->no", self.second(hidden, self.down), self.gate(x).softmax(-1))


IO, OI = ((E, I, H), (E, H, 2)), ((E, H, I), (E, 2, H))
USES = {
    "bmm": (lambda x, w, b: torch.bmm(x, w) + b, torch.bmm, IO),
    "bmm-transposed": (lambda x, w, b: x.bmm(w.mT) + b, lambda x, w: torch.bmm(x, w.transpose(1, 2)), OI),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b, x, w), lambda x, w: x @ w, IO),
    "left": (lambda x, w, b: torch.bmm(w, x.mT).mT + b, lambda x, w: (w @ x.mT).mT, OI),
    "einsum": (
        lambda x, w, b: torch.einsum("eni,eih->enh", x, w) + b,
        lambda x, w: torch.einsum("eoh,enh->eno", w, x),
        (IO[0], OI[1]),
    ),
    "indexed": (
        lambda x, w, b: torch.stack([F.linear(x[e], w[e]) for e in range(E)]) + b,
        lambda x, w: torch.stack([x[e] @ w[e].T for e in range(E)]),
        OI,
    ),
}


def case(kind):
    torch.manual_seed(len(kind))
    model = Experts(*USES[kind])
    return model, [(torch.randn(n, I, dtype=f64), torch.randint(0, 2, (n,))) for n in (4, 3)]


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


@pytest.mark.parametrize("kind", USES)
def test_structure_and_rows(kind):
    model, loader = case(kind)
    seen = nng.explain(model, loader[0])
    assert seen["up"].structure == seen["down"].structure == "kronecker"
    inputs = torch.cat([x for x, _ in loader])
    j = reference.jacobian(model, inputs)
    close(nng.Jacobian(model, loader).tensor, j)
    close(nng.GramMatrix(model, loader).tensor, torch.einsum("knd,lmd->knlm", j, j))
    flat = j.flatten(0, 1)
    exact = flat.T @ flat / len(inputs)
    regression = [(x,) for x, _ in loader]
    close(nng.FIM(model, regression, nng.PMatDense, likelihood="gaussian").to_dense(), exact)
    close(nng.FIM(model, regression, nng.PMatDiag, likelihood="gaussian").diag().flat(), exact.diagonal())
    ekfac = nng.FIM(model, regression, nng.PMatEKFAC, likelihood="gaussian")
    close(ekfac.trace(), exact.trace())
    v = nng.PVector.randn(ekfac.layer_collection, dtype=f64)
    damped = ekfac.to_dense() + 0.1 * torch.eye(len(exact), dtype=f64)
    close(ekfac.solve(v, 0.1).flat(), torch.linalg.solve(damped, v.flat()))


@pytest.mark.parametrize("kind", ["bmm", "bmm-transposed", "left", "baddbmm"])
def test_a_pair_of_factors_an_expert(kind):
    model, loader = case(kind)
    x = torch.cat([x for x, _ in loader])
    m = nng.FIM(model, [(x,)], nng.PMatKFAC, likelihood="gaussian")
    block = next(b for lay, b in m.blocks.items() if "up" in lay.names)
    stack = x.expand(E, *x.shape)
    hidden = model.first(stack, model.up, model.shift)
    f = torch.einsum("eno,ne->no", model.second(torch.tanh(hidden), model.down), model.gate(x).softmax(-1))
    g = torch.stack([torch.autograd.grad(f[:, k].sum(), hidden, retain_graph=True)[0] for k in (0, 1)])
    ones = torch.ones(E, len(x), 1, dtype=f64)
    a = torch.cat([stack, ones], -1) if block.a.shape[-1] > I else stack  # with its bias
    close(block.a, torch.einsum("eni,enj->eij", a, a) / len(x))
    close(block.g, torch.einsum("keno,kenp->eop", g, g) / len(x))


def test_what_has_no_structure_is_exact():
    """A part of a stack, products of two parameters, and broadcast stacks."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack, self.turn = nn.Parameter(torch.randn(E, I, H)), nn.Parameter(torch.randn(E, H, 2))

        def forward(self, x):
            part = torch.bmm(x.expand(2, *x.shape), self.stack[:2]).sum((0, 2))
            joint = torch.bmm(self.stack, self.turn).mean(0)  # [i 2]
            scaled = torch.baddbmm(self.stack.new_zeros(E, 1, H), x.expand(E, *x.shape), self.stack, alpha=2.0)
            return x @ joint + part[:, None] + scaled.tanh().sum((0, 2))[:, None]

    torch.manual_seed(0)
    model, x = Odd().double(), torch.randn(5, I, dtype=f64)
    close(nng.Jacobian(model, [(x,)]).tensor, reference.jacobian(model, x))
