"""Hessians of the mean loss against double backward loops, and covariances of gradients against loops over examples."""

import pickle

import pytest
import reference
import torch
from cases import CASES, ENTRIES, PARAMETER_SPACE, WHOLE, build, representation
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import nngeom as nng

cross_entropy = lambda f, y: F.cross_entropy(f, y, reduction="none")
cubic = lambda f, y: (f**3).sum(1) * (1 + y)  # not convex: only a Hessian has it


@pytest.fixture(params=CASES, scope="module")
def case(request):
    torch.set_num_threads(1)
    c = build(request.param)
    c.__dict__["hessian"] = differences(c) if request.param == "weight-norm" else twice(c)
    return c


def twice(c):
    """By double backward; fused attention cannot be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        return reference.hessian(c.model, c.inputs, c.targets, cross_entropy)


def differences(c, step=1e-5):
    """By central differences of the gradient: the fused weight norm has a wrong second derivative."""
    params = reference.parameters(c.model)
    gradient = lambda: reference.loss_gradients(c.model, c.inputs, c.targets, cross_entropy).mean(0)
    rows = []
    for p in params:
        flat = p.data.view(-1)
        for i in range(len(flat)):
            at = flat[i].item()
            flat[i] = at + step
            above = gradient()
            flat[i] = at - step
            rows.append((above - gradient()) / (2 * step))
            flat[i] = at
    return torch.stack(rows)


def matches(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()) + 1e-14)


close = matches


def layer_mask(lc):
    """``(d, d)``: whether two parameters belong to one layer."""
    owner = torch.cat(
        [torch.full((torch.Size(s).numel(),), list(lc.layers).index(own)) for s, own in zip(lc.shapes, lc.layers)]
    )
    return owner[:, None] == owner


def test_every_representation(case, request):
    h, d = case.hessian, len(case.hessian)
    close = lambda x, y: matches(x, y, 1e-6 if "weight-norm" in request.node.name else 1e-9)
    make = lambda kind: nng.Hessian(case.model, case.loader, kind, loss="cross_entropy")
    dense, diag, block, implicit = map(make, (nng.PMatDense, nng.PMatDiag, nng.PMatBlockDiag, nng.PMatImplicit))
    close(dense.to_dense(), h)
    close(diag.diag().flat(), h.diagonal())
    close(block.to_dense(), torch.where(layer_mask(block.layer_collection), h, torch.zeros_like(h)))
    v = nng.PVector.randn(implicit.layer_collection, 3, dtype=torch.float64)
    close(implicit.mv(v).flat(), v.flat() @ h)
    close(implicit.diag().flat(), h.diagonal())
    close(implicit.trace(), h.trace())
    close((implicit / 2).to_dense(), h / 2)
    assert dense.examples == diag.examples == case.n and implicit.shape == (d, d)
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize(
    "name", ["attention", "layer-norm", "group-norm", "rms-norm", "lstm", "bilinear", "batch-norm"]
)
def test_against_differences_of_gradients(name):
    """Fused operations may have a wrong second derivative that double backward would repeat."""
    c = build(name, sizes=(2,))
    close(nng.Hessian(c.model, c.loader, nng.PMatDense, loss="cross_entropy").to_dense(), differences(c), 1e-6)


def test_implicit_solves_and_estimates():
    c = build("mlp")
    h = reference.hessian(c.model, c.inputs, c.targets, cubic)
    m = nng.Hessian(c.model, c.loader, loss=cubic)
    assert isinstance(m, nng.PMatImplicit)
    least, most = torch.linalg.eigvalsh(h)[[0, -1]]
    assert least < -0.01
    close(m.lanczos(1, generator=torch.Generator().manual_seed(0))[0][0], most, 1e-6)
    close((-m).lanczos(1, generator=torch.Generator().manual_seed(0))[0][0], -least, 1e-6)
    v = nng.PVector.randn(m.layer_collection, 2, dtype=torch.float64)
    damping = 1.5 * float(-least)
    solved = torch.linalg.solve(h + damping * torch.eye(len(h), dtype=h.dtype), v.flat().T).T
    close(m.solve(v, damping, tol=1e-10).flat(), solved, 1e-7)
    estimate = m.trace("hutchinson", samples=4000, generator=torch.Generator().manual_seed(0))
    assert abs(float(estimate) - float(h.trace())) < 4 * float(estimate.standard_error)
    with pytest.raises(nng.SingularError, match="negative curvature"):
        m.solve(v, 0.0)
    with pytest.raises(nng.SingularError, match="indefinite"):
        nng.Hessian(c.model, c.loader, nng.PMatDense, loss=cubic).solve(v, 0.0)
    with pytest.raises(nng.UnsupportedError, match="lanczos"):
        m.eigh()
    with pytest.raises(nng.UnsupportedError, match="not pickled"):
        pickle.dumps(m)


@pytest.mark.parametrize("name", ENTRIES)
def test_budget_and_batches_do_not_matter(name):
    c, kind = build("conv2d"), PARAMETER_SPACE[name]
    whole = nng.Hessian(c.model, (c.inputs, c.targets), kind, loss="cross_entropy")
    with pytest.warns(nng.MemoryWarning):
        cut = nng.Hessian(c.model, iter(c.loader), kind, loss="cross_entropy", memory_budget=10)
        dense = cut.to_dense()
    close(dense, whole.to_dense(), 1e-10)


def test_losses():
    c = build("mlp")
    y = torch.randn(7, 3, dtype=torch.float64)
    close(
        nng.Hessian(c.model, (c.inputs, y), nng.PMatDense, loss="mse").to_dense(),
        reference.hessian(c.model, c.inputs, y, lambda f, y: 0.5 * (f - y).square().sum(1)),
    )
    linear = nn.Linear(4, 3).double()
    for loss, x in (("cross_entropy", c.targets), ("mse", y)):  # linear in the parameters: the Gauss-Newton matrix
        h, g = (
            measure(linear, (c.inputs, x), nng.PMatDense, loss=loss).to_dense() for measure in (nng.Hessian, nng.GGN)
        )
        close(h, g)
    zero = nng.Hessian(linear, (c.inputs, y), nng.PMatDense, loss=lambda f, y: f.sum(1))
    assert not zero.to_dense().any()
    tokens = nn.Linear(4, 5).double()
    x, y = torch.randn(3, 6, 4, dtype=torch.float64), torch.randint(0, 5, (3, 6))
    y[0, 2:] = -100
    total = lambda f, y: F.cross_entropy(f.movedim(-1, 1), y, reduction="none").sum(1)
    h = nng.Hessian(tokens, (x, y), nng.PMatDense, loss=nng.CrossEntropy(dim=-1))
    close(h.to_dense(), reference.hessian(tokens, x, y, total))


def test_fused_attention_is_differentiated_twice():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True).eval()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3))
    x, y = torch.randn(3, 4, 8), torch.tensor([0, 1, 2])
    m = nng.Hessian(
        model,
        (x, y),
        nng.PMatImplicit,
        loss="cross_entropy",
        layer_collection=nng.LayerCollection.from_model(model, include="0.self_attn*"),
    )
    v = nng.PVector.randn(m.layer_collection)
    both = nng.Hessian(model, (x, y), nng.PMatDense, loss="cross_entropy", layer_collection=m.layer_collection)
    torch.testing.assert_close(m.mv(v).flat(), both.mv(v).flat(), rtol=1e-4, atol=1e-5)
    assert m.dtype == torch.float32 and float(both.norm()) > 0.01


def test_half_precision_accumulates_in_float32():
    c = build("mlp")
    wide = nng.Hessian(c.model, c.loader, nng.PMatDense, loss="cross_entropy").to_dense()
    model = c.model.to(torch.bfloat16)
    h = nng.Hessian(model, [(x.bfloat16(), y) for x, y in c.loader], nng.PMatDense, loss="cross_entropy")
    assert h.dtype == torch.float32
    assert float((h.to_dense() - wide).norm() / wide.norm()) < 0.1


class Once(torch.autograd.Function):
    """A custom function with a first derivative only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


class Wrong(torch.autograd.Function):
    """``exp(cumsum(x))`` whose backward hides that it depends on the first input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.cumsum(1).exp()

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0]
        x = torch.cat([x[:, :1].detach(), x[:, 1:]], 1)
        return (g * x.cumsum(1).exp()).flip(1).cumsum(1).flip(1)


def test_refusals():
    c = build("mlp")
    with pytest.raises(nng.UnsupportedError, match="fit="):
        nng.Hessian(c.model, c.loader, nng.PMatKFAC, loss="cross_entropy")
    with pytest.raises(nng.ArgumentTypeError, match="expected PMatImplicit"):
        nng.Hessian(c.model, c.loader, "dense", loss="cross_entropy")
    with pytest.raises(nng.ArgumentError, match="no option"):
        nng.Hessian(c.model, c.loader, nng.PMatDense, loss="cross_entropy", sharing="reduce")
    with pytest.raises(nng.ArgumentTypeError, match="process_group"):
        nng.Hessian(c.model, c.loader, loss="cross_entropy", process_group=1)
    with pytest.raises(nng.LoaderError, match="needs targets"):
        nng.Hessian(c.model, [c.inputs], nng.PMatDense, loss="cross_entropy")
    for kind in (nng.PMatDense, nng.PMatImplicit):
        with pytest.raises(nng.LoaderError, match="empty"):
            nng.Hessian(c.model, [], kind, loss="cross_entropy")
        for layer in (nn.Dropout(0.5), nn.BatchNorm1d(4).double()):
            model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3)).double().train()
            with pytest.raises(nng.ModeError, match="eval"):
                nng.Hessian(model, c.loader, kind, loss="cross_entropy")
    x = c.inputs.clone()
    x[3, 0] = float("nan")
    with pytest.raises(nng.NonFiniteError, match=r"batch 0.*\[3\]"):
        nng.Hessian(c.model, (x, c.targets), nng.PMatDense, loss="cross_entropy")
    with pytest.raises(nng.NonFiniteError, match="second derivatives"):
        nng.Hessian(c.model, c.loader, nng.PMatDense, loss=lambda f, y: (f - f.detach()).abs().pow(1.5).sum(1))
    with pytest.raises(nng.UnsupportedError, match="without second derivative"):
        nng.Hessian(c.model, c.loader, nng.PMatDense, loss=lambda f, y: Once.apply(f).square().sum(1))
    with pytest.raises(nng.CoverageError, match="not symmetric"):
        nng.Hessian(c.model, c.loader, nng.PMatDense, loss=lambda f, y: Wrong.apply(f).square().sum(1))
    with pytest.raises(nng.CoverageError, match="does not depend"):
        nng.Hessian(c.model, c.loader, nng.PMatDense, loss=lambda f, y: f.detach().sum(1))


# -- covariances of gradients ------------------------------------------------------------------------------------------

COVARIANCES = [
    k
    for k, r in PARAMETER_SPACE.items()
    if k == "implicit" or (r.centred and k != "eye")  # the identity: no diagonal
]


@pytest.mark.parametrize("name", ["mlp", "conv2d", "language-model", "gru", "bare", "embedding"])
def test_covariance(name):
    c = build(name)
    g = reference.loss_gradients(c.model, c.inputs, c.targets, cross_entropy)
    g = g - g.mean(0)
    truth = g.T @ g / len(g)
    for kind in COVARIANCES:
        m = nng.GradientCovariance(c.model, c.loader, representation(kind, c.model), loss="cross_entropy")
        close(m.diag().flat(), truth.diagonal())
        close(m.trace(), truth.trace())
        if kind in WHOLE:
            close(m.to_dense(), truth)
        if kind == "block-diag":
            close(m.to_dense(), torch.where(layer_mask(m.layer_collection), truth, torch.zeros_like(truth)))
        if kind == "quasi-diag":
            close(m.to_dense(), torch.where(m.to_dense() != 0, truth, torch.zeros_like(truth)))
            assert int((m.to_dense() != 0).sum()) > len(truth) or name in ("gru", "bare")


@pytest.mark.parametrize("kind", COVARIANCES)
def test_covariance_of_gradients_far_from_zero(kind):
    """Mean 1e4, standard deviation 1, in single precision: squares taken before the mean would leave nothing."""
    torch.manual_seed(0)
    x = 1e4 + torch.randn(64, 3)
    model = nn.Linear(3, 2, bias=False)
    data = [(x[:30], x[:30]), (x[30:], x[30:])]
    m = nng.GradientCovariance(model, data, representation(kind, model), loss=lambda f, y: f.sum(1))
    wide = x.double()
    cov = torch.cov(wide.T, correction=0).repeat(2, 2)
    got = m.to_dense().double()
    assert float((got.diagonal() - cov.diagonal()).abs().max()) < 0.02
    if kind in WHOLE:
        assert float((got - cov).abs().max()) < 0.02


def test_covariance_with_batches_that_skip_a_layer():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.a(x) + self.b(x) if bool(x[0, 0] > 0) else self.a(x)

    torch.manual_seed(0)
    model, x, y = Gate().double(), torch.randn(6, 2, dtype=torch.float64), torch.randint(0, 2, (6,))
    x[:3, 0], x[3:, 0] = x[:3, 0].abs(), -x[3:, 0].abs()
    g = reference.loss_gradients(model, x, y, cross_entropy)
    g = g - g.mean(0)
    for loader in ([(x[:3], y[:3]), (x[3:], y[3:])], iter([(x[3:], y[3:]), (x[:3], y[:3])])):
        m = nng.GradientCovariance(model, loader, nng.PMatDense, loss="cross_entropy")
        close(m.to_dense(), g.T @ g / 6)


def test_covariance_refusals():
    c = build("mlp")
    for kind in (
        nng.PMatKFAC,
        nng.PMatEKFAC.options(sua=True),
        nng.PMatMixed({"0": nng.PMatKFAC}, default=nng.PMatDiag),
    ):
        with pytest.raises(nng.UnsupportedError, match="is offered as PMatDense, PMatDiag"):
            nng.GradientCovariance(c.model, c.loader, kind, loss="cross_entropy")
    with pytest.raises(nng.ArgumentTypeError, match="representation"):
        nng.GradientCovariance(c.model, c.loader, "dense", loss="cross_entropy")
    with pytest.raises(nng.ArgumentTypeError, match="process_group"):
        nng.GradientCovariance(c.model, c.loader, loss="cross_entropy", process_group=1)
