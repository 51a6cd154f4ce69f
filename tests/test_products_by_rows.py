"""Products on models that have neither forward mode nor second derivatives, and under the budget of their object."""

import pytest
import reference
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import nngeom as nng
from nngeom.core import memory

X = torch.float64


class Distances(nn.Module):
    """Distances to learned centres: torch has no second derivative of them, and no forward mode."""

    def __init__(self):
        super().__init__()
        self.map, self.centres = nn.Linear(3, 2), nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        return -torch.cdist(torch.tanh(self.map(x)), self.centres)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x * x * g


class OnlyOnce(nn.Module):
    """The outputs come out of a custom function that can be differentiated once."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 4)

    def forward(self, x):
        return _Cube.apply(self.map(x))


class OnceInside(nn.Module):
    """A layer behind the function that can be differentiated once has second derivatives, those before it have none."""

    def __init__(self):
        super().__init__()
        self.map, self.head = nn.Linear(3, 2), nn.Linear(2, 4)

    def forward(self, x):
        return self.head(_Cube.apply(self.map(x)))


class Checkpointed(nn.Module):
    """Activations of a part are computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.part, self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(checkpoint(self.part, x, use_reentrant=False))


class DistancesOfPositions(nn.Module):
    """Outputs with positions."""

    def __init__(self):
        super().__init__()
        self.map, self.centres = nn.Linear(3, 2), nn.Parameter(torch.randn(2, 2))

    def forward(self, x):
        return torch.cdist(self.map(torch.stack([x, x.flip(-1)], 1)), self.centres).flatten(1)


MODELS = [Distances, OnlyOnce, OnceInside, Checkpointed, DistancesOfPositions]


@pytest.fixture(params=MODELS, ids=lambda c: c.__name__)
def case(request):
    torch.manual_seed(0)
    model = request.param().double()
    return model, [torch.randn(4, 3, dtype=X), torch.randn(2, 3, dtype=X)]


def test_maps_and_kernels(case):
    model, data = case
    rows = reference.jacobian(model, torch.cat(data))  # (c, n, d)
    flat = rows.flatten(0, 1)
    j = nng.Jacobian(model, data, nng.PushForwardImplicit)
    v = nng.PVector.randn(j.layer_collection, 2, dtype=X)
    u = nng.FVector(torch.randn(2, *rows.shape[:2], dtype=X))
    torch.testing.assert_close(j.mv(v).flat(), v.flat() @ flat.T)
    torch.testing.assert_close(j.T.mv(u).flat(), u.flat() @ flat)
    torch.testing.assert_close((j.T @ j).mv(v).flat(), v.flat() @ (flat.T @ flat))
    torch.testing.assert_close(j.materialize().tensor, rows)
    for centered in (False, True):
        k = nng.GramMatrix(model, data, nng.FMatImplicit, centered=centered)
        r = rows - rows.mean(1, keepdim=True) if centered else rows
        kernel = r.flatten(0, 1) @ r.flatten(0, 1).T
        torch.testing.assert_close(k.mv(u).flat(), u.flat() @ kernel)
        torch.testing.assert_close(k.vTMv(u), ((u.flat() @ kernel) * u.flat()).sum(-1))
        solved = torch.linalg.solve(kernel + 0.5 * torch.eye(len(kernel), dtype=X), u.flat().T).T
        torch.testing.assert_close(k.solve(u, 0.5, tol=1e-12).flat(), solved)
    k = nng.GramMatrix(model, data, nng.FMatImplicit, other=data[:1])
    torch.testing.assert_close(k.to_dense(), flat @ rows[:, :4].flatten(0, 1).T)


def test_fisher_and_gradients_of_products(case):
    model, data = case
    rows = reference.jacobian(model, torch.cat(data))
    fisher = reference.sandwich(rows, reference.softmax_metric(model(torch.cat(data))))
    f = nng.FIM(model, data, nng.PMatImplicit)
    v = torch.randn(f.shape[0], dtype=X, requires_grad=True)
    form = f.vTMv(nng.PVector(f.layer_collection, v))
    torch.testing.assert_close(form, v @ fisher @ v)
    torch.testing.assert_close(torch.autograd.grad(form, v)[0], 2 * fisher @ v)
    j = nng.Jacobian(model, data, nng.PushForwardImplicit)
    square = j.mv(nng.PVector(f.layer_collection, v)).tensor.square().sum()
    flat = rows.flatten(0, 1)
    torch.testing.assert_close(torch.autograd.grad(square, v)[0], 2 * flat.T @ (flat @ v))


def test_errors_of_the_model_are_not_taken_for_missing_derivatives():
    model = nn.Linear(3, 2).double()
    j = nng.Jacobian(model, [torch.randn(2, 3, dtype=X)], nng.PushForwardImplicit)
    v = nng.PVector.randn(j.layer_collection, dtype=X)

    def broken(x):
        raise RuntimeError("broken")

    model.forward = broken
    with pytest.raises(RuntimeError, match="broken"):
        j.mv(v)


# -- the budget --------------------------------------------------------------------------------------------------------

BUDGET = 123_456


class Watching(nn.Module):
    """Notes the budget that each forward pass runs under."""

    def __init__(self):
        super().__init__()
        self.map, self.seen = nn.Linear(3, 2), set()

    def forward(self, x):
        self.seen.add(memory.budget())
        return torch.tanh(self.map(x))


def objects(model, data):
    budget = {"memory_budget": BUDGET}
    labelled = [(x, torch.zeros(len(x), dtype=torch.long)) for x in data]
    k = nng.GramMatrix(model, data, nng.FMatImplicit, **budget)
    centred = nng.GramMatrix(model, data, nng.FMatImplicit, centered=True, **budget)
    other = nng.GramMatrix(model, data, nng.FMatImplicit, other=data[:1], **budget)
    j = nng.Jacobian(model, data, nng.PushForwardImplicit, **budget)
    b = nng.Jacobian(model, data, nng.PullBackImplicit, **budget)
    f = nng.FIM(model, labelled, nng.PMatImplicit, **budget)
    h = nng.Hessian(model, labelled, loss="cross_entropy", **budget)
    c = nng.GradientCovariance(model, labelled, nng.PMatImplicit, loss="cross_entropy", **budget)
    return k, centred, other, j, b, f, h, c


def uses(k, centred, other, j, b, f, h, c):
    v = nng.PVector.randn(j.layer_collection, dtype=X)
    u = nng.FVector(torch.randn(2, 6, dtype=X))
    w = nng.FVector(torch.randn(2, 4, dtype=X))
    yield from ((lambda m=m: m.mv(u)) for m in (k, k.T, centred, 2 * k, k + k, j @ j.T, j.T, b))
    yield from ((lambda m=m: m.vTMv(u)) for m in (k, centred))
    yield from ((lambda m=m: m.materialize()) for m in (k, centred, other, other.T, j, b, b.T, b @ b.T, j.T @ j))
    yield from ((lambda m=m: m.diag()) for m in (k, centred, k + k, f, h, c, j.T @ j, f + h))
    yield from ((lambda m=m: m.trace()) for m in (k, centred, f, h, c, b @ b.T))
    yield from ((lambda m=m: m.mv(v)) for m in (j, b.T, j.T @ j, f, h, c, f + h, f @ c, f.inverse(1.0)))
    yield from ((lambda m=m: m.to_dense()) for m in (k, other, f, h, c))
    yield lambda: other.mv(w)
    yield lambda: k.materialize(nng.FMatDiag)
    yield lambda: (j.T @ j).materialize(nng.PMatDiag)
    yield lambda: (j.T @ j).materialize(nng.PMatKFAC)
    yield lambda: (k.solve(u, 1.0), f.solve(v, 1.0), (j.T @ j).solve(v, 1.0))
    yield lambda: (k.trace("hutchinson"), k.norm(), k.norm(samples=2), k.lanczos(1), f.trace("hutchinson"))


def test_what_outlives_a_call_keeps_its_budget():
    torch.manual_seed(0)
    model = Watching().double()
    data = [torch.randn(4, 3, dtype=X), torch.randn(2, 3, dtype=X)]
    made = objects(model, data)
    model.seen.clear()
    for number, use in enumerate(uses(*made)):
        use()
        assert model.seen == {BUDGET}, number
    assert memory.budget() == memory.DEFAULT_BUDGET


def test_a_gradient_is_taken_under_the_budget_too():
    torch.manual_seed(0)
    model = Watching().double()
    data = [torch.randn(4, 3, dtype=X), torch.randn(2, 3, dtype=X)]
    k, _, _, j, _, f, h, _ = objects(model, data)
    v = torch.randn(f.shape[0], dtype=X, requires_grad=True)
    u = torch.randn(2, 6, dtype=X, requires_grad=True)
    x = nng.PVector(f.layer_collection, v)
    products = f.vTMv(x), h.vTMv(x), j.mv(x).tensor.norm(), f.solve(x, 1.0).norm(), k.mv(nng.FVector(u)).norm()
    for value in products:
        model.seen.clear()
        value.backward()
        assert model.seen == {BUDGET}


# -- grad mode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_callers_grad_mode_changes_nothing(off):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    data = [(torch.randn(4, 3, dtype=X), torch.tensor([0, 1, 2, 0]))]
    loss = {"loss": "cross_entropy"}

    def numbers():
        for kind in (nng.PMatImplicit, nng.PMatDense, nng.PMatDiag, nng.PMatBlockDiag):
            yield nng.Hessian(model, data, kind, **loss).to_dense()
        for kind in (nng.PMatImplicit, nng.PMatDense, nng.PMatEKFAC):
            yield nng.FIM(model, data, kind).to_dense()
            yield nng.GGN(model, data, kind, **loss).to_dense()
        for kind in (nng.PMatImplicit, nng.PMatLowRank) if off is torch.no_grad else ():
            yield nng.GradientCovariance(model, data, kind, **loss).to_dense()
        for kind in (nng.FMatImplicit, nng.FMatDense):
            yield nng.GramMatrix(model, data, kind).to_dense()
        j = nng.Jacobian(model, data, nng.PushForwardImplicit)
        yield j.materialize().tensor
        yield j.mv(nng.PVector(j.layer_collection, torch.ones(j.shape[-1], dtype=X))).tensor

    for expected, found in zip(list(numbers()), _under(off, numbers)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert float(found.norm()) > 0


def _under(mode, numbers):
    with mode():
        return list(numbers())


def test_rows_of_products_are_placed_in_every_batch():
    """Examples that the data places, behind an operation without second derivative: the likeliest axis is the wrong
    one.
    """

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 5, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)

        def forward(self, x):
            order = x[:, 0].argsort()
            h = self.first(x[order]).tanh()[order.argsort()]
            return self.second(torch.cdist(h, torch.ones(5, 5, dtype=torch.float64)))

    model, x = Sorted(), torch.randn(6, 4, dtype=torch.float64)
    x[:3] = x[:3][x[:3, 0].argsort()]  # the first batch stays as it is
    matrix = nng.FIM(model, [(x[:3],), (x[3:],)], nng.PMatImplicit)
    torch.testing.assert_close(matrix.to_dense(), reference.fisher(model, x))
