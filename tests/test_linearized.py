"""Linearised and alpha-scaled models against dense Jacobians and the limits that tie them together."""

from __future__ import annotations

import copy
import itertools

import cases
import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.linearized import Linearized, Scaled, scaled_lr


def move(model: nn.Module, scale: float = 0.3) -> torch.Tensor:
    """Add a random displacement to the parameters; returned flat."""
    deltas = [scale * torch.randn(p.shape, dtype=p.dtype) for p in model.parameters()]
    with torch.no_grad():
        for p, d in zip(model.parameters(), deltas):
            p.add_(d)
    return torch.cat([d.flatten() for d in deltas])


def train(model: nn.Module, x, y, lr: float, steps: int, momentum: float = 0.0, path: list | None = None) -> nn.Module:
    """Full-batch descent on a squared loss; outputs are appended to ``path``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(x)
        if path is not None:
            path.append(out.detach())
        F.mse_loss(out, y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_the_taylor_expansion(name):
    case = cases.build(name)
    x = case.inputs
    lin = Linearized(case.model)
    f0 = case.model(x).detach()
    assert torch.allclose(lin(x), f0, rtol=0, atol=1e-12)
    delta = move(lin)
    j = reference.jacobian(case.model, x)
    expected = f0 + (j @ delta).T.view_as(f0)
    out = lin(x)
    pushed = nng.Jacobian(case.model, case.loader, nng.PushForwardDense).mv(lin.delta)
    assert (out - f0 - pushed.tensor.T.view_as(f0)).abs().max() < 1e-10 * (1 + expected.abs().max())
    assert (out - expected).abs().max() < 1e-10 * (1 + expected.abs().max())
    assert torch.allclose(lin.delta.flat(), delta, rtol=0, atol=1e-13)
    with torch.no_grad():
        assert torch.allclose(lin(x), expected, rtol=1e-10, atol=1e-10) and not lin(x).requires_grad
    u = torch.randn_like(out)
    grads = torch.autograd.grad(out, list(lin.parameters()), u, allow_unused=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, lin.parameters())])
    pulled = torch.einsum("cnd,nc->d", j, u)
    assert (flat - pulled).abs().max() < 1e-10 * (1 + pulled.abs().max())


def test_the_model_is_left_alone_and_the_order_kept():
    model = cases.build("frozen").model
    before = copy.deepcopy(model.state_dict())
    lin = Linearized(model)
    assert [p.shape for p in lin.parameters()] == [p.shape for p in model.parameters() if p.requires_grad]
    move(lin)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert lin.delta.layer_collection == nng.LayerCollection.from_model(model)


def test_second_order_distance_to_the_network():
    case = cases.build("mlp")
    errors = []
    for scale in (1e-2, 5e-3):
        torch.manual_seed(1)
        lin = Linearized(case.model)
        move(lin, scale)
        errors.append((lin(case.inputs) - lin.model(case.inputs)).abs().max())
    assert 3.7 < errors[0] / errors[1] < 4.3


@pytest.mark.parametrize("kind", [Linearized, lambda m: Scaled(m, 3.0)])
@pytest.mark.parametrize("name", ["batch-norm", "frozen", "language-model", "gru", "weight-norm"])
def test_state_dict_round_trip(kind, name):
    case = cases.build(name)
    one, other = kind(case.model), copy.deepcopy(case.model)
    move(other)  # starts elsewhere
    two = kind(other)
    move(one)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(case.inputs), two(case.inputs)) and torch.equal(one.delta.flat(), two.delta.flat())
    start = one.reference()(case.inputs)
    assert torch.allclose(start, case.model(case.inputs), atol=1e-12)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_trains_with_any_optimizer_to_the_kernel_solution(optimizer):
    case = cases.build("mlp", sizes=(2, 2))
    x, y = case.inputs, torch.randn(4, 3, dtype=torch.float64)
    lin = Linearized(case.model)
    opt = optimizer(lin.parameters(), lr={"SGD": 0.3, "Adam": 0.03, "LBFGS": 0.5}[optimizer.__name__])

    def closure():
        opt.zero_grad()
        loss = 0.5 * (lin(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(600):
        opt.step(closure)
    assert closure() < 1e-3 * 0.5 * (case.model(x) - y).square().mean()
    j = reference.jacobian(case.model, x).flatten(0, 1)
    if optimizer is torch.optim.SGD:  # stays in the span of the rows
        _, s, vh = torch.linalg.svd(j, full_matrices=False)
        inside = vh.T @ (vh @ lin.delta.flat())
        assert torch.allclose(inside, lin.delta.flat(), atol=1e-10)


def test_large_alpha_follows_the_linearized_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 1, dtype=torch.float64)
    path: list = []
    train(Linearized(model), x, y, 0.2, 100, path=path)
    errors = []
    for alpha in (128.0, 256.0, 512.0):
        scaled, other = Scaled(model, alpha), []
        train(scaled, x, y, scaled.learning_rate(0.2), 100, path=other)
        errors.append((torch.stack(other) - torch.stack(path)).abs().max())
    assert errors[-1] < 1e-2
    for big, small in itertools.pairwise(errors):
        assert abs(big / small - 2) < 0.05


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_linear_model_does_not_feel_alpha(momentum):
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    predictions = []
    for alpha in (0.5, 1.0, 100.0):
        predictions.append(train(Scaled(model, alpha), x, y, scaled_lr(0.1, alpha), 50, momentum)(x))
    predictions.append(train(Linearized(model), x, y, 0.1, 50, momentum)(x))
    for p in predictions[1:]:
        assert torch.allclose(p, predictions[0], rtol=0, atol=1e-11)
    adam = []
    for alpha in (1.0, 50.0):
        scaled = Scaled(model, alpha)
        optimizer = torch.optim.Adam(scaled.parameters(), lr=scaled_lr(0.01, alpha, scale_free=True), eps=1e-8 * alpha)
        for _ in range(20):
            optimizer.zero_grad()
            F.mse_loss(scaled(x), y).backward()
            optimizer.step()
        adam.append(scaled(x))
    assert torch.allclose(adam[0], adam[1], rtol=0, atol=1e-11)


def test_alpha_one_is_the_model_and_f0_can_be_dropped():
    case = cases.build("mlp")
    one = Scaled(case.model, 1.0)
    move(one)
    assert torch.allclose(one(case.inputs), one.model(case.inputs), atol=1e-13)
    two = Scaled(case.model, 5.0, include_f0=False)
    assert two(case.inputs).abs().max() == 0
    move(two)
    expected = 5 * (two.model(case.inputs) - case.model(case.inputs))
    assert torch.allclose(two(case.inputs), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "gru"])
def test_gradients_in_the_inputs(name):
    case = cases.build(name)
    x = case.inputs.requires_grad_()
    u = torch.randn_like(case.model(x))
    for wrapped in (Linearized(case.model), Scaled(case.model, 7.0)):
        move(wrapped)
        eps = 1e-6
        direction = torch.randn_like(x)
        with torch.no_grad():
            slope = ((wrapped(x + eps * direction) - wrapped(x - eps * direction)) / (2 * eps) * u).sum()
        gradient = torch.autograd.grad((wrapped(x) * u).sum(), x)[0]
        assert torch.allclose((gradient * direction).sum(), slope, rtol=1e-6)


def test_the_tangent_kernel_of_a_linearized_model_stays():
    case = cases.build("conv2d")
    lin = Linearized(case.model)
    move(lin)
    before = nng.GGN(case.model, case.loader, nng.PMatDense, loss="mse").to_dense()
    after = nng.GGN(lin, case.loader, nng.PMatDense, loss="mse").to_dense()
    assert torch.allclose(before, after, atol=1e-10)


@pytest.mark.parametrize("kind", [Linearized, lambda m: Scaled(m, 10.0)])
def test_errors(kind):
    case = cases.build("batch-norm")
    with pytest.raises(nng.ModeError, match="eval"):
        kind(copy.deepcopy(case.model).train())
    with pytest.raises(nng.ModeError, match="eval"):
        kind(case.model).train()(case.inputs)
    with pytest.raises(nng.ModeError, match="dropout"):
        kind(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))(torch.ones(1, 2))
    with pytest.raises(nng.CollectionError, match="trainable"):
        kind(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(TypeError, match="Module"):
        kind(torch.sin)
    with pytest.raises(nng.OutputError, match="tensor"):
        kind(nn.LSTM(2, 2))(torch.ones(1, 3, 2))
    for alpha in (0, -1.0, float("inf"), "2"):
        with pytest.raises(nng.ArgumentError, match="alpha"):
            Scaled(case.model, alpha)


NORMS = {
    "layer norm": lambda: nn.LayerNorm(5),
    "instance norm": lambda: nn.InstanceNorm1d(6, affine=True),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "softmax": lambda: nn.Softmax(-1),
    "log softmax": lambda: nn.LogSoftmax(1),
}


@pytest.mark.parametrize("name", NORMS)
def test_gradient_in_the_inputs(name):
    """Torch's tangents of some operations are wrong, or fail, when differentiated in the input: against central
    differences.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 1), NORMS[name](), nn.Flatten(), nn.Linear(30, 2)).double()
    lin = Linearized(model)
    move(lin)
    x, v = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(lin(x)[:, 0].sum(), x)
    with torch.no_grad():
        numeric = (lin(x + 1e-6 * v) - lin(x - 1e-6 * v))[:, 0].sum() / 2e-6
    torch.testing.assert_close((gradient * v).sum(), numeric, rtol=1e-6, atol=1e-8)
