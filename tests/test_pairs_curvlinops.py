"""The table of the page for those who come from curvlinops: every row of it, the numbers of both beside each other."""

import pytest
import torch
from pairs import Pairs
from torch import nn
from torch.testing import assert_close

import nngeom as nng

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
PAIRS = Pairs("curvlinops")
DATA = [(torch.randn(n, 4, dtype=torch.float64), torch.randint(0, 3, (n,))) for n in (8, 5, 3)]
N, LOSS = 16, nn.CrossEntropyLoss()


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Model:
    """A net, the list of its parameters, and a direction as both libraries take it."""

    def __init__(self, net=None):
        torch.manual_seed(0)
        self.net = (net or Net)().double()
        self.parameters = list(self.net.parameters())
        self.v = torch.randn(sum(p.numel() for p in self.parameters), dtype=torch.float64)
        self.vector = nng.PVector.from_flat(nng.LayerCollection.from_model(self.net), self.v)

    def there(self, kind, loss=LOSS, data=DATA, **options):
        """A linear operator of theirs."""
        return getattr(curvlinops, kind)(self.net, loss, self.parameters, data, **options)

    def kfac(self, **options):
        options = {"fisher_type": curvlinops.FisherType.TYPE2, "separate_weight_and_bias": False, **options}
        return self.there("KFACLinearOperator", **options)


def agree(here, there, **tolerances):
    assert_close(here.flat(), torch.as_tensor(there), **tolerances)


@PAIRS.of("`GGNLinearOperator(")
def ggn(m):
    there = m.there("GGNLinearOperator") @ m.v
    agree(nng.GGN(m.net, DATA, nng.PMatImplicit, loss="cross_entropy") @ m.vector, there)


@PAIRS.of("`HessianLinearOperator`")
def hessian(m):
    agree(nng.Hessian(m.net, DATA, loss="cross_entropy") @ m.vector, m.there("HessianLinearOperator") @ m.v)


@PAIRS.of("`EFLinearOperator`")
def empirical(m):
    there = m.there("EFLinearOperator") @ m.v
    agree(nng.EmpiricalFIM(m.net, DATA, nng.PMatImplicit, loss="cross_entropy") @ m.vector, there)


@PAIRS.of("`FisherMCLinearOperator`")
def monte_carlo(m):
    """Both are random: each is near the exact one, nearer with more draws."""
    exact = (nng.FIM(m.net, DATA, nng.PMatImplicit) @ m.vector).flat()
    for samples, limit in ((20, 0.5), (2000, 0.05)):
        there = m.there("FisherMCLinearOperator", mc_samples=samples) @ m.v
        here = nng.FIM_MonteCarlo(m.net, DATA, nng.PMatImplicit, samples=samples) @ m.vector
        for x in (there, here.flat()):
            assert 0 < (x - exact).norm() < limit * exact.norm()


@PAIRS.of('`KFACLinearOperator(fisher_type="type-2")`')
def kfac(m):
    there = m.kfac() @ m.v
    agree(nng.FIM(m.net, DATA, nng.PMatKFAC) @ m.vector, there)
    agree(nng.GGN(m.net, DATA, nng.PMatKFAC, loss="cross_entropy") @ m.vector, there)


@PAIRS.of('`EKFACLinearOperator(fisher_type="type-2")`')
def ekfac(m):
    options = {"fisher_type": curvlinops.FisherType.TYPE2, "separate_weight_and_bias": False}
    there = m.there("EKFACLinearOperator", **options) @ m.v
    agree(nng.FIM(m.net, DATA, nng.PMatEKFAC) @ m.vector, there)


class Shared(nn.Sequential):
    """Weights used at every one of three positions."""

    def __init__(self):
        super().__init__(nn.Unflatten(1, (2, 2)), nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3), Mean())


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


@PAIRS.of('`kfac_approx="reduce"`')
def shared(_):
    m = Model(Shared)
    for sharing in ("expand", "reduce"):
        there = m.kfac(kfac_approx=sharing) @ m.v
        agree(nng.FIM(m.net, DATA, nng.PMatKFAC.options(sharing=sharing)) @ m.vector, there)


@PAIRS.of("`KFACInverseLinearOperator(A, damping=x)`")
def inverse(m):
    there = curvlinops.KFACInverseLinearOperator(m.kfac(), damping=0.1) @ m.v
    F = nng.FIM(m.net, DATA, nng.PMatKFAC)
    agree(F.solve(m.vector, nng.FactoredTikhonov(0.1**2, balanced=False)), there)


@PAIRS.of("`KFACInverseLinearOperator(A, damping=x, use_heuristic_damping=True)`")
def heuristic(m):
    there = curvlinops.KFACInverseLinearOperator(m.kfac(), damping=0.1, use_heuristic_damping=True) @ m.v
    agree(nng.FIM(m.net, DATA, nng.PMatKFAC).solve(m.vector, nng.FactoredTikhonov(0.1)), there)


@PAIRS.of("`KFACInverseLinearOperator(A, damping=x, use_exact_damping=True)`")
def exact_inverse(m):
    there = curvlinops.KFACInverseLinearOperator(m.kfac(), damping=0.1, use_exact_damping=True) @ m.v
    F = nng.FIM(m.net, DATA, nng.PMatKFAC)
    agree(F.solve(m.vector, 0.1), there)
    agree(F.inverse(0.1) @ m.vector, there)


class Damped(curvlinops.GGNLinearOperator):
    """Theirs with a tenth on the diagonal."""

    def _matmat(self, M):
        return [x + 0.1 * y for x, y in zip(super()._matmat(M), M)]


@PAIRS.of("`CGInverseLinearOperator(A)`")
def conjugate_gradients(m):
    damped = Damped(m.net, LOSS, m.parameters, DATA, check_deterministic=False)
    there = curvlinops.CGInverseLinearOperator(damped, tolerance=1e-10, eps=0, max_iter=100) @ m.v
    F = nng.GGN(m.net, DATA, nng.PMatImplicit, loss="cross_entropy")
    agree(F.solve(m.vector, 0.1), there, rtol=1e-5, atol=1e-6)


@PAIRS.of("`JacobianLinearOperator`")
def jacobian(m):
    J = nng.Jacobian(m.net, DATA, nng.PushForwardImplicit)
    there = curvlinops.JacobianLinearOperator(m.net, m.parameters, DATA) @ m.v
    assert_close((J @ m.vector).tensor.T.flatten(), there)  # example by example there
    w = torch.randn(N, 3, dtype=torch.float64)
    there = curvlinops.TransposedJacobianLinearOperator(m.net, m.parameters, DATA) @ w.flatten()
    agree(J.T @ nng.FVector(w.T), there)


@PAIRS.of("`SubmatrixLinearOperator`")
def submatrix(m):
    last = list(range(25, 43))  # parameters of the second layer
    there = curvlinops.SubmatrixLinearOperator(m.there("GGNLinearOperator"), last, last) @ m.v[25:]
    only = nng.LayerCollection.from_model(m.net, include=["2"])
    F = nng.GGN(m.net, DATA, nng.PMatDense, loss="cross_entropy", layer_collection=only)
    agree(F @ nng.PVector.from_flat(only, m.v[25:]), there)
    whole = nng.GGN(m.net, DATA, nng.PMatDense, loss="cross_entropy")
    assert_close(whole.to_dense()[25:, 25:] @ m.v[25:], there)


@PAIRS.of('a loss with `reduction="sum"`')
def sums(m):
    there = m.there("GGNLinearOperator", loss=nn.CrossEntropyLoss(reduction="sum")) @ m.v
    agree((nng.GGN(m.net, DATA, nng.PMatImplicit, loss="cross_entropy") * N) @ m.vector, there)


@PAIRS.of("the squared error")
def squared(m):
    data = [(x, torch.randn(len(x), 3, dtype=torch.float64)) for x, _ in DATA]
    there = m.there("HessianLinearOperator", loss=nn.MSELoss(), data=data) @ m.v
    agree((nng.Hessian(m.net, data, loss=nn.MSELoss()) * (1 / 3)) @ m.vector, there)
    agree((nng.Hessian(m.net, data, loss="mse") * (2 / 3)) @ m.vector, there)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", PAIRS)
def test_numbers_are_those_of_curvlinops(row):
    PAIRS[row](Model())


def test_every_row_is_compared():
    PAIRS.require_all()
