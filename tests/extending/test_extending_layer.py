"""A layer from outside with the adapter of its operation: rows as autograd's, under everything that reads rows."""

import mix
import pytest
import reference
import torch
from cases import ENTRIES, STORED, representation
from mix import Mix
from torch import Tensor, nn
from trained import EXACT, close, cross_entropy, step

import nngeom as nng
from nngeom.layers import adapts
from nngeom.layers.adapter import ADAPTERS
from nngeom.optim import KFAC


class Pooled(nn.Module):
    """Features at positions, mixed there."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = Mix(4, nn.Linear(4, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.mix(x).tanh().mean(1))


class Twice(nn.Module):
    """The same weight in two places."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = Mix(4, nn.Sequential(nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.mix(self.mix(x)))


MODELS = {
    "plain": (lambda: nn.Sequential(Mix(4, nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)), (4,)),
    "nested": (lambda: nn.Sequential(Mix(4, Mix(4, nn.Linear(4, 4))), nn.Linear(4, 3)), (4,)),
    "positions": (Pooled, (5, 4)),
    "twice": (Twice, (4,)),
}
LOSS = {"loss": "cross_entropy"}


def made(name):
    torch.manual_seed(1)
    make, shape = MODELS[name]
    model = make().double()
    for p in model.parameters():
        p.data.copy_(0.6 * torch.randn(p.shape))
    x, y = torch.randn(7, *shape, dtype=torch.float64), torch.randint(3, (7,))
    return model, x, y, [(x[:3], y[:3]), (x[3:], y[3:])]


def by_fallback(measure, monkeypatch):
    with monkeypatch.context() as patch:
        for f in (torch.lerp, Tensor.lerp):
            patch.delitem(ADAPTERS, f)
        return measure()


@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_is_used(name):
    model, x, y, loader = made(name)
    for row in nng.explain(model, (x, y)).rows:
        assert row.structure != "fallback"
        if row.shape == (4,) and "lerp" in row.operations:
            assert set(row.operations) == {"lerp"} and row.structure == "exact"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [None, 40_000])
def test_every_measure(name, budget):
    model, x, y, loader = made(name)
    options = {"memory_budget": budget}
    fisher = reference.fisher(model, x)
    close(nng.FIM(model, loader, nng.PMatDense, **options).to_dense(), fisher)
    close(nng.GGN(model, loader, nng.PMatDense, **LOSS, **options).to_dense(), fisher)
    g = reference.loss_gradients(model, x, y, cross_entropy)
    centred = g - g.mean(0)
    close(nng.EmpiricalFIM(model, loader, nng.PMatDense, **LOSS, **options).to_dense(), g.T @ g / 7)
    close(nng.GradientCovariance(model, loader, nng.PMatDense, **LOSS, **options).to_dense(), centred.T @ centred / 7)
    hessian = reference.hessian(model, x, y, cross_entropy)
    close(nng.Hessian(model, loader, nng.PMatDense, **LOSS, **options).to_dense(), hessian)
    v = nng.PVector.randn(nng.LayerCollection.from_model(model), dtype=torch.float64)
    for implicit, truth in ((nng.FIM(model, loader, nng.PMatImplicit, **options), fisher),):
        close(implicit @ v, truth @ v.flat())
    close(nng.Hessian(model, loader, **LOSS, **options) @ v, hessian @ v.flat())


@pytest.mark.parametrize("name", MODELS)
def test_every_representation_is_that_of_the_fallback_or_its_own(name, monkeypatch):
    model, x, y, loader = made(name)
    for kind in STORED:
        m = nng.FIM(model, loader, representation(kind, model))
        apart = by_fallback(lambda kind=kind: nng.FIM(model, loader, representation(kind, model)), monkeypatch)
        if kind in ENTRIES or kind in ("low-rank", "eye"):
            close(m.to_dense(), apart.to_dense())
    fisher = reference.fisher(model, x)
    kfac = nng.FIM(model, loader, nng.PMatKFAC).to_dense()
    names = nng.LayerCollection.from_model(model).offsets()
    for key, (lo, shape) in names.items():
        if key.endswith("weight") and len(shape) == 1:  # exact, feature by feature
            part = slice(lo, lo + shape[0])
            close(kfac[part, part], torch.diag(fisher[part, part].diagonal()))


@pytest.mark.parametrize("name", MODELS)
def test_kernels_and_jacobians(name):
    model, x, y, loader = made(name)
    j = reference.jacobian(model, x)
    kernel = torch.einsum("knd,lmd->knlm", j, j)
    close(nng.Jacobian(model, loader).tensor, j)
    close(nng.GramMatrix(model, loader).tensor, kernel)
    close(nng.GramMatrix(model, loader, memory_budget=10_000).tensor, kernel)
    close(nng.GramMatrix(model, loader, nng.FMatDiag).tensor, j.square().sum(-1))
    close(sum(k.tensor for k in nng.GramMatrices(model, loader).values()), kernel)
    live = nng.GramMatrix(model, loader, differentiable=True).trace()
    grads = torch.autograd.grad(live, list(model.parameters()), allow_unused=True)
    assert all(g is None or bool(torch.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("name", MODELS)
def test_files_sums_mixtures_and_steps(name, tmp_path):
    model, x, y, loader = made(name)
    mixed = nng.PMatMixed({"*inner*": nng.PMatDiag}, default=nng.PMatEKFAC)
    m = nng.FIM(model, loader, mixed)
    nng.save(m, tmp_path / "m")
    assert torch.equal(nng.load(tmp_path / "m").to_dense(), m.to_dense())
    kfac = nng.FIM(model, loader, nng.PMatKFAC)
    close((m + kfac).to_dense(), m.to_dense() + kfac.to_dense())
    matrix = nng.EmpiricalFIM(model, (x, y), nng.PMatKFAC, **LOSS)
    gradient, moved = step(KFAC(model, **EXACT), model, x, y)
    close(moved, matrix.solve(gradient, 1e-2))


def test_weights_of_other_shapes_go_through_the_fallback():
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.tensor(0.3)), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.lerp(x, x.sin(), self.weight))

    torch.manual_seed(0)
    model, x = Scalar().double(), torch.randn(5, 4, dtype=torch.float64)
    assert nng.explain(model, (x,))["weight"].structure == "fallback"
    close(nng.FIM(model, [(x,)], nng.PMatDense).to_dense(), reference.fisher(model, x))


def test_a_mistake_in_an_adapter_is_caught(monkeypatch):
    model, x, y, loader = made("plain")

    def wrong(call, input, end, weight):
        """With the inputs added instead of subtracted."""
        return mix.lerp(call, -input, end, weight)

    for f in (torch.lerp, Tensor.lerp):
        monkeypatch.setitem(ADAPTERS, f, ADAPTERS[f])
    adapts(torch.lerp, Tensor.lerp)(wrong)
    assert nng.explain(model, (x, y))["0.weight"].structure == "fallback"
    close(nng.FIM(model, loader, nng.PMatDense).to_dense(), reference.fisher(model, x))
