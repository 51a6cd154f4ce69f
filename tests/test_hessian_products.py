"""Products of the Hessian with one vector, which lie where they are added, beside double backward loops."""

import pytest
import reference
import torch
from cases import build
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.cotangents.cross_entropy import CrossEntropy
from nngeom.cotangents.slope import slope
from nngeom.cotangents.softmax import Labels

cross_entropy = lambda f, y: F.cross_entropy(f, y, reduction="none")
NAMES = ["mlp", "conv2d", "tied", "batch-norm", "embedding", "bare", "lstm"]


@pytest.mark.parametrize("name", NAMES)
def test_one_vector(name):
    c = build(name)
    h = reference.hessian(c.model, c.inputs, c.targets, cross_entropy)
    m = nng.Hessian(c.model, c.loader, loss="cross_entropy")
    v = nng.PVector.randn(m.layer_collection, 3, dtype=torch.float64)
    expected = v.flat() @ h
    tol = {"rtol": 1e-9, "atol": 1e-11 * float(expected.abs().max())}
    for x, y in zip(v.flat(), expected):
        torch.testing.assert_close(m.mv(nng.PVector.from_flat(m.layer_collection, x)).flat(), y, **tol)
    torch.testing.assert_close(m.mv(v).flat(), expected, **tol)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_slope_and_its_derivative(weight, smoothing, soft):
    torch.manual_seed(0)
    z = 3 * torch.randn(5, 4, dtype=torch.float64)
    y = torch.rand(5, 4, dtype=torch.float64) if soft else torch.tensor([0, 3, -100, 1, 2])
    loss = lambda x: F.cross_entropy(x, y, weight, reduction="sum", label_smoothing=smoothing)
    labels = Labels(y, weight, smoothing)
    torch.testing.assert_close(slope(z, labels), torch.func.grad(loss)(z))
    x = z.clone().requires_grad_()
    v = torch.randn_like(z)
    (found,) = torch.autograd.grad(slope(x, labels), x, v)
    expected = torch.func.hessian(loss)(z).reshape(20, 20) @ v.flatten()
    torch.testing.assert_close(found.flatten(), expected)


class Half(CrossEntropy):
    """Half of it, and says so of its value alone."""

    def __call__(self, outputs, targets):
        return 0.5 * super().__call__(outputs, targets)


def test_a_loss_of_its_own_is_differentiated_itself():
    c = build("mlp")
    h = reference.hessian(c.model, c.inputs, c.targets, cross_entropy)
    m = nng.Hessian(c.model, c.loader, loss=Half())
    v = nng.PVector.randn(m.layer_collection, dtype=torch.float64)
    torch.testing.assert_close(m.mv(v).flat(), 0.5 * v.flat() @ h)


def test_parameters_without_part_in_it():
    """A bias that is added to all logits alike has zero curvature, a layer that is not used none."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.left = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model, x, y = Model(), torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 2, (6,))
    m = nng.Hessian(model, [(x[:4], y[:4]), (x[4:], y[4:])], loss="cross_entropy")
    v = nng.PVector.randn(m.layer_collection, dtype=torch.float64)
    h = reference.hessian(model.used, x, y, cross_entropy)
    torch.testing.assert_close(m.mv(v).flat()[:8], h @ v.flat()[:8])
    assert bool((m.mv(v).flat()[8:] == 0).all())


def test_of_a_linear_loss_it_is_zero():
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    m = nng.Hessian(model, (x, torch.zeros(4)), loss=lambda f, y: f.sum(1))
    v = nng.PVector.randn(m.layer_collection, dtype=torch.float64)
    assert bool((m.mv(v).flat() == 0).all())


def test_without_gradients_and_in_half_precision():
    c = build("mlp")
    m = nng.Hessian(c.model, c.loader, loss="cross_entropy")
    v = nng.PVector.randn(m.layer_collection, dtype=torch.float64)
    expected = m.mv(v).flat()
    with torch.no_grad():
        torch.testing.assert_close(m.mv(v).flat(), expected)
    model = c.model.to(torch.bfloat16)
    half = nng.Hessian(model, [(x.bfloat16(), y) for x, y in c.loader], loss="cross_entropy")
    found = half.mv(v.to(torch.float32)).flat()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))
