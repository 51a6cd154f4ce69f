"""Kernel predictions against training the linearised network itself."""

import math

import pytest
import torch
from cases import build

import nngeom as nng


def setting(name="mlp"):
    c = build(name)
    train, test = c.inputs[:5], c.inputs[5:]
    args = (c.model, (train,)), (c.model, (test,))
    k, kt = nng.GramMatrix(*args[0]), nng.GramMatrix(c.model, (test,), other=(train,))
    j, jt = (nng.Jacobian(*a).tensor for a in args)
    f0, f0t = (c.model(x).detach().T.contiguous() for x in (train, test))
    y = torch.randn(3, 5, dtype=torch.float64)
    return k, kt, j, jt, nng.FVector(f0), nng.FVector(f0t), nng.FVector(y)


@pytest.mark.parametrize("name", ["mlp", "frozen", "conv2d"])
def test_gradient_flow_is_training_the_linearised_network(name):
    k, kt, j, jt, f0, f0t, y = setting(name)
    lr, steps = 0.002 / float(k.eigvalsh()[-1]), 4000
    w = torch.zeros(j.shape[-1], dtype=torch.float64)
    for _ in range(steps):  # midpoint steps: second order in the learning rate
        slope = lambda v: -torch.einsum("knd,kn->d", j, f0.tensor + torch.einsum("knd,d->kn", j, v) - y.tensor)
        w = w + lr * slope(w + 0.5 * lr * slope(w))
    time = lr * steps
    for got, rows, start in (
        (nng.gradient_flow_mse(k, y, time, f0), j, f0),
        (nng.gradient_flow_mse(k, y, time, f0, kt, f0t), jt, f0t),
    ):
        expected = start.tensor + torch.einsum("knd,d->kn", rows, w)
        torch.testing.assert_close(got.tensor, expected, rtol=1e-5, atol=1e-5)


def test_the_ends_of_time():
    k, kt, j, jt, f0, f0t, y = setting()
    torch.testing.assert_close(nng.gradient_flow_mse(k, y, 0.0, f0).tensor, f0.tensor)
    torch.testing.assert_close(nng.gradient_flow_mse(k, y, 0.0, f0, kt, f0t).tensor, f0t.tensor)
    end = nng.gradient_flow_mse(k, y, math.inf, f0, kt, f0t).tensor
    w = torch.linalg.lstsq(j.flatten(0, 1), (y - f0).tensor.flatten(), driver="gelsd").solution
    torch.testing.assert_close(end, f0t.tensor + torch.einsum("knd,d->kn", jt, w), rtol=1e-7, atol=1e-7)
    ridge = f0t + nng.kernel_regression(k, y - f0, kt, 1e-9)
    torch.testing.assert_close(ridge.tensor, end, rtol=1e-4, atol=1e-4)


def test_ridge_is_the_primal_solution():
    k, kt, j, jt, f0, f0t, y = setting()
    flat = j.flatten(0, 1)
    w = torch.linalg.solve(
        flat.T @ flat + 0.3 * torch.eye(flat.shape[1], dtype=flat.dtype), flat.T @ y.tensor.flatten()
    )
    torch.testing.assert_close(nng.kernel_regression(k, y, kt, 0.3).tensor, torch.einsum("knd,d->kn", jt, w))


def test_errors():
    k, kt, *_, f0, f0t, y = setting()
    with pytest.raises(nng.ArgumentError, match="other=train"):
        nng.kernel_regression(k, y, kt.T, 0.1)
    with pytest.raises(nng.ArgumentError, match="time"):
        nng.gradient_flow_mse(k, y, -1.0)
    with pytest.raises(nng.ArgumentTypeError, match="kernel"):
        nng.kernel_regression(k.tensor, y, kt, 0.1)
    with pytest.raises(nng.ArgumentError, match="K_test_train"):
        nng.gradient_flow_mse(k, y, 1.0, f0, f0_test=f0t)
    with pytest.raises(nng.ArgumentError, match="batches"):
        nng.gradient_flow_mse(k, nng.FVector(y.tensor.expand(2, 3, 5)), 1.0, nng.FVector(f0.tensor.expand(3, 3, 5)))
    for which in range(3):
        given = [y, f0, f0t]
        given[which] = given[which] * math.nan
        with pytest.raises(nng.NonFiniteError, match="NaN"):
            nng.gradient_flow_mse(k, given[0], 1.0, given[1], kt, given[2])


def test_batches_of_targets_and_starts():
    k, kt, *_, f0, f0t, y = setting()
    targets, starts = (nng.FVector(torch.stack([v.tensor, 2 * v.tensor])) for v in (y, f0))
    for given, begun in ((targets, f0), (y, starts), (targets, starts)):
        for there in ((), (kt, f0t)):
            both = nng.gradient_flow_mse(k, given, 0.3, begun, *there)
            for i in range(2):
                one = [nng.FVector(v.tensor[i]) if v.tensor.ndim > 2 else v for v in (given, begun)]
                torch.testing.assert_close(both.tensor[i], nng.gradient_flow_mse(k, one[0], 0.3, one[1], *there).tensor)
