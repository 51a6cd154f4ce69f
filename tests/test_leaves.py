"""Parameters that modules exchange for other tensors while they run: results are those of the model as written."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.capture.network import Network
from nngeom.capture.recorder import record

torch.manual_seed(3)
X, Y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 1])


class Odd(nn.Module):
    """Linear layers, a scale that no adapter knows, and one weight in two places."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale, self.table = nn.Parameter(torch.rand(4)), nn.Parameter(torch.randn(4, 4))
        self.b.weight = self.table

    def forward(self, x):
        h = torch.tanh(self.a(x))
        h = self.b(h) + h @ self.table.tanh()
        return self.c(h * self.scale.cumsum(0))


class Exchanging(Odd):
    """The same whose modules hold other parameters while they run."""

    def forward(self, x):
        parts = [(m, key, p) for m in self.modules() for key, p in m.named_parameters(recurse=False)]
        new = {}
        try:
            for module, key, p in parts:
                new.setdefault(id(p), nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
                setattr(module, key, new[id(p)])
            return super().forward(x)
        finally:
            for module, key, p in parts:
                setattr(module, key, p)


def pair():
    torch.manual_seed(0)
    plain, other = Odd().double(), Exchanging().double()
    other.load_state_dict(plain.state_dict())
    return plain, other


KINDS = [nng.PMatDense, nng.PMatDiag, nng.PMatBlockDiag, nng.PMatLowRank, nng.PMatMixed({"*": nng.PMatDiag})]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_matrices_of_exchanged_parameters(kind):
    plain, other = pair()
    want, got = (nng.FIM(m, [X[:4], X[4:]], kind).to_dense() for m in (plain, other))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    assert want.norm() > 0.1 and all(p.grad is None for p in other.parameters())


def test_an_empirical_matrix_and_a_kernel_of_exchanged_parameters():
    plain, other = pair()
    want, got = (nng.EmpiricalFIM(m, (X, Y), nng.PMatDense, loss="cross_entropy").to_dense() for m in (plain, other))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    want, got = (nng.GramMatrix(m, X, nng.FMatDense).to_dense() for m in (plain, other))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_part_of_the_parameters():
    plain, other = pair()
    for model in (plain, other):
        model.a.requires_grad_(False)
    for choice in ({"include": ["b", "table"]}, {"exclude": "c"}):
        want, got = (
            nng.FIM(m, X, nng.PMatDense, layer_collection=nng.LayerCollection.from_model(m, **choice)).to_dense()
            for m in (plain, other)
        )
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_optimizers_see_exchanged_parameters():
    """``.grad`` lands on what is exchanged, so that only what was observed is compared."""
    plain, other = pair()
    seen = []
    for model in (plain, other):
        opt = nng.optim.NaturalGradient(model, nng.PMatDiag, lr=0.0)
        with opt.observe():
            F.cross_entropy(model(X), Y).backward()
        seen.append(opt.observer.batchwise)
    assert seen[0] == seen[1] and seen[0]


def test_what_differentiates_the_parameters_themselves_refuses_exchanged_ones():
    _, other = pair()
    v = nng.PVector(
        nng.LayerCollection.from_model(other), torch.ones(sum(p.numel() for p in other.parameters())).double()
    )
    calls = [
        lambda: nng.FIM(other, X, nng.PMatImplicit),
        lambda: nng.Hessian(other, (X, Y), loss="cross_entropy") @ v,
        lambda: nng.GramMatrix(other, X, nng.FMatImplicit),
        lambda: nng.GramMatrix(other, X, differentiable=True),
        lambda: nng.mgs.trace_penalty(other, X),
        lambda: nng.mgs.trace_penalty(other, X, estimator="rademacher"),
    ]
    for call in calls:
        with pytest.raises(nng.CoverageError, match=r"exchanges the parameters \['scale', 'table', 'a.weight'"):
            call()


def test_leaves_are_the_parameters_where_nothing_is_exchanged():
    plain, other = pair()
    for model, exchanged in ((plain, False), (other, True)):
        network = Network.build(model, None, None)
        leaves = record(network, (X,), exchange=True).leaves
        assert leaves.exchanged is exchanged and list(leaves.tensors) == list(network.parameters)
        assert all((leaves.tensors[name] is p) is not exchanged for name, p in network.parameters.items())


def test_a_copy_of_the_model_is_no_exchange():
    plain, _ = pair()
    other = copy.deepcopy(plain)
    with pytest.raises(nng.CoverageError, match="other tensors of their shapes"):
        nng.FIM(plain, X, nng.PMatDiag, function=other)


@pytest.mark.parametrize("first", [False, True], ids=["twice", "after-the-first-use"])
def test_a_parameter_that_is_exchanged_within_a_pass_is_an_error(first):
    plain, _ = pair()

    def function(x):
        own = plain.b.bias
        h = torch.tanh(plain.a(x))
        try:
            for j in range(2):
                if j or not first:
                    plain.b.bias = nn.Parameter(own.detach() + j)
                h = torch.tanh(plain.b(h))
            return plain.c(h)
        finally:
            plain.b.bias = own

    with pytest.raises(nng.CoverageError, match=r"'b.bias'.*several tensors"):
        nng.FIM(plain, X, nng.PMatDiag, function=function)
