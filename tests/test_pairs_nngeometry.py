"""The table of the page for those who come from NNGeometry: every row of it, the numbers of both beside each other."""

import copy

import pytest
import torch
from pairs import Pairs
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import nngeom as nng

pytest.importorskip("nngeometry", reason="nngeometry is not installed")
from nngeometry import metrics
from nngeometry import object as theirs
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection

PAIRS = Pairs("nngeometry")


class Model:
    """A net with a gradient, and its data as both take them."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.x, self.y = torch.randn(12, 4), torch.randint(0, 3, (12,))
        self.loader = DataLoader(TensorDataset(self.x, self.y), batch_size=5)
        nn.functional.cross_entropy(self.net(self.x), self.y).backward()
        self.gradient = nng.PVector.from_grad(self.net)

    def flat(self):
        return nn.utils.parameters_to_vector(self.net.parameters()).detach().clone()

    def solved(self, kind, regul):
        """Of four examples: their solve of the gradient, and our matrix."""
        few = DataLoader(TensorDataset(self.x[:4], self.y[:4]), batch_size=4)
        there = metrics.FIM(self.net, few, getattr(theirs, kind), variant="classif_logits")
        there = there.solve(theirs.PVector.from_model_grad(self.net), regul=regul).to_torch()
        return there, nng.FIM(self.net, few, getattr(nng, kind))

    def map(self):
        """Their Jacobian."""
        layers, function = LayerCollection.from_model(self.net), lambda *batch: self.net(batch[0])
        backend = TorchHooksJacobianBackend(model=self.net, layer_collection=layers, function=function)
        return theirs.PFMapDense(backend, examples=self.loader)

    def there(self, kind="PMatDense", measure="FIM", **options):
        """A matrix of theirs."""
        return getattr(metrics, measure)(self.net, self.loader, getattr(theirs, kind), **options)


@PAIRS.of("`PVector.from_model(model)`")
def from_model(m):
    there, here, live = theirs.PVector.from_model(m.net), nng.PVector.from_model(m.net), None
    before = m.flat()
    with torch.no_grad():
        m.net[0].weight.add_(1.0)
    assert_close(there.to_torch().detach(), m.flat())
    assert_close(here.flat(), before)
    live = nng.PVector.from_model(m.net, live=True)
    assert live.flat().requires_grad and there.to_torch().requires_grad and not here.flat().requires_grad


@PAIRS.of("`PMatKFAC.solve(v, regul=x)`")
def solve(m):
    there = m.there("PMatKFAC").solve(theirs.PVector.from_model_grad(m.net), regul=1e-2).to_torch()
    F = nng.FIM(m.net, m.loader, nng.PMatKFAC)
    assert_close(F.solve(m.gradient, nng.FactoredTikhonov(1e-2)).flat(), there)
    exact = torch.linalg.solve(F.to_dense() + 1e-2 * torch.eye(F.shape[0]), m.gradient.flat())
    assert_close(F.solve(m.gradient, damping=1e-2).flat(), exact)


@PAIRS.of('`FIM(..., variant="classif_logits")`')
def logits(m):
    for kind in ("PMatDense", "PMatDiag", "PMatBlockDiag", "PMatKFAC", "PMatEKFAC", "PMatQuasiDiag", "PMatLowRank"):
        there = m.there(kind, variant="classif_logits")
        if kind == "PMatEKFAC":
            there.update_diag(m.loader)
        for options in ({}, {"likelihood": "categorical"}):
            here = nng.FIM(m.net, m.loader, getattr(nng, kind), **options)
            assert_close(here.vTMv(m.gradient), there.vTMv(theirs.PVector.from_model_grad(m.net)))


@PAIRS.of('`variant="regression"`')
def regression(m):
    there = m.there(variant="regression").to_torch()
    assert_close(nng.FIM(m.net, m.loader, nng.PMatDense, likelihood="gaussian").to_dense(), there)


@PAIRS.of("`n_output`, `device`")
def no_shapes(m):
    here = nng.FIM(copy.deepcopy(m.net).float(), [m.x.float()], nng.PMatDense)
    assert (here.dtype, here.device) == (torch.float32, torch.device("cpu"))


@PAIRS.of("`get_dense_tensor()`, `to_torch()`")
def dense(m):
    there, v = m.there("PMatDiag").to_torch(), theirs.PVector.from_model_grad(m.net)
    assert_close(nng.FIM(m.net, m.loader, nng.PMatDiag).to_dense(), there)
    assert_close(m.gradient.flat(), v.to_torch())


@PAIRS.of("`frobenius_norm()`")
def norm(m):
    for kind in ("PMatDense", "PMatKFAC"):
        assert_close(nng.FIM(m.net, m.loader, getattr(nng, kind)).norm(), m.there(kind).frobenius_norm())


@PAIRS.of("`get_diag()`")
def diagonal(m):
    here = nng.FIM(m.net, m.loader, nng.PMatDense).diag()
    assert isinstance(here, nng.PVector)
    assert_close(here.flat(), m.there().get_diag())


@PAIRS.of("`PVector.from_model_grad(model)`")
def in_and_out(m):
    there = theirs.PVector.from_model_grad(m.net)
    assert_close(m.gradient.flat(), there.to_torch())
    other = copy.deepcopy(m)
    there.add_to_model(m.net)
    m.gradient.add_to(other.net)
    assert_close(other.flat(), m.flat())
    there.copy_to_model(m.net)
    m.gradient.copy_to(other.net)
    assert_close(other.flat(), m.flat())
    assert_close(m.flat(), m.gradient.flat())


@PAIRS.of("`PFMapDense`")
def maps(m):
    there, J = m.map(), nng.Jacobian(m.net, m.loader, nng.PushForwardDense)
    assert_close(J.tensor, there.to_torch())  # (outputs, examples, parameters) in both
    w = there.jvp(theirs.PVector.from_model_grad(m.net))
    assert_close((J @ m.gradient).tensor, w.to_torch())
    back = nng.Jacobian(m.net, m.loader, nng.PullBackDense) @ nng.FVector(w.to_torch())
    assert_close(back.flat(), there.vjp(w).to_torch())


@PAIRS.of("`regul=`")
def damping(m):
    there = m.there().solve(theirs.PVector.from_model_grad(m.net), regul=1e-2).to_torch()
    assert_close(nng.FIM(m.net, m.loader, nng.PMatDense).solve(m.gradient, damping=1e-2).flat(), there)


@PAIRS.of("`compute_eigendecomposition()`")
def spectra(m):
    for kind in ("PMatDense", "PMatKFAC"):
        there = m.there(kind)
        there.compute_eigendecomposition()
        found = there.get_eigendecomposition()[0]
        if kind == "PMatKFAC":  # of each factor there
            found = torch.cat([torch.outer(a, g).flatten() for a, g in found.values()]).sort()[0]
        assert_close(nng.FIM(m.net, m.loader, getattr(nng, kind)).eigh()[0], found)


@PAIRS.of("`PMatEKFAC` has the eigenvalues of KFAC")
def eigenvalues(m):
    there = m.there("PMatEKFAC", variant="classif_logits")
    assert_close(there.to_torch(), nng.FIM(m.net, m.loader, nng.PMatKFAC).to_dense())
    there.update_diag(m.loader)
    here = nng.FIM(m.net, m.loader, nng.PMatEKFAC)
    assert_close(here.to_dense(), there.to_torch())
    assert_close(here.rescaled(m.net, m.loader).to_dense(), there.to_torch())


@PAIRS.of("`M.mm(N)`")
def products(m):
    for kind in ("PMatDense", "PMatDiag", "PMatBlockDiag"):
        there, here = m.there(kind), nng.FIM(m.net, m.loader, getattr(nng, kind))
        assert_close((here @ here).to_dense(), there.mm(there).to_torch())


@PAIRS.of("`centering=True`")
def centred(m):
    layers = LayerCollection.from_model(m.net)
    function = lambda *batch: m.net(batch[0])
    backend = TorchHooksJacobianBackend(model=m.net, layer_collection=layers, function=function, centering=True)
    whole = DataLoader(TensorDataset(m.x, m.y), batch_size=12)
    there = theirs.FMatDense(backend, examples=whole).to_torch()
    assert_close(nng.GramMatrix(m.net, whole, centered=True).tensor, there)


@PAIRS.of("`PFMapDense.jvp(v)`")
def map_products(m):
    there, J = m.map(), nng.Jacobian(m.net, m.loader, nng.PushForwardDense)
    w = there.jvp(theirs.PVector.from_model_grad(m.net))
    assert_close(J.mv(m.gradient).tensor, w.to_torch())
    assert_close(J.T.mv(J.mv(m.gradient)).flat(), there.vjp(w).to_torch())


@PAIRS.of("`PMatLowRank.solve`")
def low_rank(m):
    there, F = m.solved("PMatLowRank", 1e-2)
    exact = torch.linalg.solve(F.to_dense() + 1e-2 * torch.eye(F.shape[0]), m.gradient.flat())
    assert_close(F.solve(m.gradient, damping=1e-2).flat(), exact)
    outside = nng.PVector(m.gradient.layer_collection, exact - there)
    assert outside.norm() > 0.1 * exact.norm() and F.mv(outside).norm() < 1e-8 * outside.norm()


@PAIRS.of("`PMatQuasiDiag.solve`")
def quasi_diagonal(m):
    there, F = m.solved("PMatQuasiDiag", 1e-4)
    with pytest.raises(nng.SingularError, match="not positive definite"):
        F.solve(m.gradient, damping=1e-4)
    assert_close(F.solve(m.gradient, damping=1e-4, indefinite=True).flat(), there)


@PAIRS.of("a `function` that runs another model")
def another_model(m):
    other = copy.deepcopy(m.net)
    there = metrics.FIM(m.net, m.loader, theirs.PMatDense, function=lambda *batch: other(batch[0]))
    assert float(there.frobenius_norm()) == 0.0
    with pytest.raises(nng.CoverageError):
        nng.FIM(m.net, m.loader, nng.PMatDense, function=lambda *batch: other(batch[0]))


@PAIRS.of("layers that are not on its list")
def layers(m):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.own.exp() * x

    net = nn.Sequential(m.net, Scaled())
    with pytest.raises(Exception, match="I do not know what to do with layer"):
        LayerCollection.from_model(net)
    assert nng.FIM(net, m.loader, nng.PMatDense).shape[0] == len(m.flat()) + 3


@pytest.fixture
def double():
    """What theirs makes inside is of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", PAIRS)
def test_numbers_are_those_of_nngeometry(row, double):
    PAIRS[row](Model())


def test_every_row_is_compared():
    PAIRS.require_all()
