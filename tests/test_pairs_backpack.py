"""The table of the page for those who come from BackPACK: every row of it, the numbers of both beside each other."""

import copy

import pytest
import torch
from pairs import Pairs
from torch import nn
from torch.testing import assert_close

import nngeom as nng

pytest.importorskip("backpack", reason="backpack is not installed")
from backpack import backpack, extend, extensions

PAIRS = Pairs("backpack")
N = 10
X, Y = torch.randn(N, 4, dtype=torch.float64), torch.randint(0, 3, (N,))


class Model:
    """A net, and a copy of it that is extended."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.extended = extend(copy.deepcopy(self.net))

    def there(self, extension, field):
        """What an extension leaves on the parameters, by their names."""
        self.extended.zero_grad()
        with backpack(extension):
            extend(nn.CrossEntropyLoss())(self.extended(X), Y).backward()
        return {name: getattr(p, field) for name, p in self.extended.named_parameters()}


def agree(here, there, **tolerances):
    for name, x in there.items():
        assert_close(here[name], x, **tolerances)


@PAIRS.of("`extend(model)`")
def nothing_is_left(m):
    before = {name: set(vars(p)) for name, p in m.net.named_parameters()}
    nng.GGN(m.net, (X, Y), nng.PMatDiag, loss="cross_entropy")
    assert {name: set(vars(p)) for name, p in m.net.named_parameters()} == before
    assert not any(module._forward_hooks or module._backward_hooks for module in m.net.modules())


@PAIRS.of("`DiagGGNExact`")
def diagonal(m):
    there = m.there(extensions.DiagGGNExact(), "diag_ggn_exact")
    agree(nng.GGN(m.net, (X, Y), nng.PMatDiag, loss="cross_entropy").diag(), there)


@PAIRS.of("`DiagGGNMC`")
def drawn_diagonal(m):
    """Both are random: each is near the exact one, nearer with more draws."""
    exact = nng.FIM(m.net, (X, Y), nng.PMatDiag).diag().flat()
    for samples, limit in ((20, 0.5), (2000, 0.05)):
        there = m.there(extensions.DiagGGNMC(mc_samples=samples), "diag_ggn_mc")
        here = nng.FIM_MonteCarlo(m.net, (X, Y), nng.PMatDiag, samples=samples).diag()
        for x in (torch.cat([x.flatten() for x in there.values()]), here.flat()):
            assert 0 < (x - exact).norm() < limit * exact.norm()


def blocks(factors):
    """Kronecker products of their lists of factors, by parameter."""
    return {name: torch.kron(*f) if len(f) == 2 else f[0] for name, f in factors.items()}


def diagonal_blocks(F):
    """Those of single parameters, by name."""
    ends, dense = 0, F.to_dense()
    for name, p in (("0.weight", 20), ("0.bias", 5), ("2.weight", 15), ("2.bias", 3)):
        yield name, dense[ends : ends + p, ends : ends + p]
        ends += p


@PAIRS.of("`KFLR`")
def factors(m):
    there = blocks(m.there(extensions.KFLR(), "kflr"))
    for name, block in diagonal_blocks(nng.FIM(m.net, (X, Y), nng.PMatKFAC)):
        assert_close(block, there[name])


@PAIRS.of("`KFAC`")
def drawn_factors(m):
    exact = dict(diagonal_blocks(nng.FIM(m.net, (X, Y), nng.PMatKFAC)))
    for samples, limit in ((20, 0.7), (2000, 0.07)):
        there = blocks(m.there(extensions.KFAC(mc_samples=samples), "kfac"))
        here = diagonal_blocks(nng.FIM_MonteCarlo(m.net, (X, Y), nng.PMatKFAC, samples=samples))
        for name, block in here:
            for x in (block, there[name]):
                assert 0 < (x - exact[name]).norm() < limit * exact[name].norm()


@PAIRS.of("`SumGradSquared`")
def squares(m):
    there = m.there(extensions.SumGradSquared(), "sum_grad_squared")
    here = nng.EmpiricalFIM(m.net, (X, Y), nng.PMatDiag, loss="cross_entropy").diag()
    agree(here, {name: x * N for name, x in there.items()})  # of gradients over n there


@PAIRS.of("`Variance`")
def variance(m):
    there = m.there(extensions.Variance(), "variance")
    here = nng.GradientCovariance(m.net, (X, Y), nng.PMatDiag, loss="cross_entropy").diag()
    agree(here, {name: x * N**2 for name, x in there.items()})


@PAIRS.of("`BatchGrad`")
def rows(m):
    there = m.there(extensions.BatchGrad(), "grad_batch")
    (chunk,) = nng.rows(m.net, (X, Y), loss="cross_entropy")
    for layer, j in chunk.jacobians.items():
        rows = j.matrix()[0, :, 0]  # outputs and inputs of the layer, the bias as the last of these
        weight, bias = layer.names
        assert_close(rows[..., :-1], there[weight] * N)
        assert_close(rows[..., -1], there[bias] * N)


@PAIRS.of("`DiagHessian`")
def hessian(m):
    there = m.there(extensions.DiagHessian(), "diag_h")
    agree(nng.Hessian(m.net, (X, Y), nng.PMatDiag, loss="cross_entropy").diag(), there)


@PAIRS.of("gradients of a mean loss")
def means(m):
    """The loss of an example is that of the example alone: of one example both are the same."""
    there = m.there(extensions.BatchGrad(), "grad_batch")
    for n in range(N):
        m.net.zero_grad()
        nn.functional.cross_entropy(m.net(X[n : n + 1]), Y[n : n + 1]).backward()
        agree(nng.PVector.from_grad(m.net), {name: x[n] * N for name, x in there.items()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", PAIRS)
def test_numbers_are_those_of_backpack(row):
    PAIRS[row](Model())


def test_every_row_is_compared():
    PAIRS.require_all()
