"""The quadratic model: closed forms against an ODE solver, exact times, the three data sets."""

from __future__ import annotations

import pytest
import torch

import nngeom as nng
from nngeom.linearized import (
    convergence_times,
    gradient_flow,
    label_noise,
    quadratic_modes,
    reversed_modes,
    singular_modes,
    spurious_feature,
)


def problem(n: int, d: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=g, dtype=torch.float64)
    return X, torch.randn(n, generator=g, dtype=torch.float64), 0.3 + torch.rand(d, generator=g, dtype=torch.float64)


TIMES = torch.tensor([0.0, 0.05, 0.2, 0.5, 1.0, 3.0])


@pytest.mark.parametrize("regime", ["linear", "nonlinear"])
@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (7, 3)])
def test_closed_forms_solve_the_gradient_flow(regime, shape):
    X, y, w0 = problem(*shape)
    theta = quadratic_modes(X, y, w0, TIMES, regime)
    assert theta.shape == (len(TIMES), shape[1]) and theta.dtype == torch.float64
    assert torch.allclose(theta[0], 0.5 * w0**2, atol=1e-12)
    assert (theta - gradient_flow(X, y, w0, TIMES, regime)).abs().max() < 1e-8
    single = quadratic_modes(X.float(), y.float(), w0.float(), TIMES, regime)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), theta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("regime", ["linear", "nonlinear"])
@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (7, 3)])
def test_what_is_null_is_told_in_every_dtype(regime, shape):
    X, y, w0 = (t.float() for t in problem(*shape))
    X[:, -1] = X[:, 0]  # a null direction, exactly
    of = lambda f, *more: (f(X, y, w0, *more, regime), f(X.double(), y.double(), w0.double(), *more, regime))
    asked = torch.tensor([3.0, 0.0, 0.2, 0.2])  # in any order
    for single, double in (of(quadratic_modes, asked), of(gradient_flow, asked), of(convergence_times, 1e-2)):
        assert single.dtype == torch.float32
        assert torch.allclose(single, double.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(singular_modes(X, y).mu == 0, singular_modes(X.double(), y.double()).mu == 0)
    assert singular_modes(X, y).mu[-1] == 0 and convergence_times(X, y, w0, 1e-2, regime)[-1] == 0
    assert not quadratic_modes(X, y, torch.zeros_like(w0), torch.tensor([0.0, 1e9]), regime).any()


@pytest.mark.parametrize("f", [quadratic_modes, gradient_flow])
@pytest.mark.parametrize("times", [[-0.1], [1.0, -2.0], []])
def test_the_flow_begins_at_0(f, times):
    X, y, w0 = problem(3, 3)
    with pytest.raises(nng.NNGeomError, match="at least 0"):
        f(X, y, w0, torch.tensor(times), "nonlinear")


def test_conventions_of_the_basis():
    X, y, _ = problem(5, 7)
    m = singular_modes(X, y)
    u = X @ m.directions[:, :5] / m.mu[:5].sqrt()
    assert torch.allclose(u.T @ u, torch.eye(5, dtype=X.dtype), atol=1e-10)
    assert torch.allclose(u.T @ y, m.target[:5], atol=1e-10) and bool((m.target >= 0).all())
    assert torch.allclose(m.mu.sqrt()[:5], torch.linalg.svdvals(X), atol=1e-10) and bool((m.mu[5:] == 0).all())
    assert torch.allclose(m.directions.T @ m.directions, torch.eye(7, dtype=X.dtype), atol=1e-10)
    end = quadratic_modes(X, y, torch.ones(7), torch.tensor([1e4]), "nonlinear")[0]
    assert torch.allclose(m.predict(X, end), y, atol=1e-8)  # interpolates, from any positive start
    assert torch.allclose(end[5:], torch.full((2,), 0.5, dtype=X.dtype))


@pytest.mark.parametrize("regime", ["linear", "nonlinear"])
def test_a_mode_without_target_decays_and_the_formula_is_smooth_there(regime):
    X, w0 = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)), torch.tensor([1.0, 1.0])
    exact = quadratic_modes(X, torch.tensor([0.0, 1.0], dtype=torch.float64), w0, TIMES, regime)
    near = quadratic_modes(X, torch.tensor([1e-12, 1.0], dtype=torch.float64), w0, TIMES, regime)
    expected = 0.5 / (1 + 4 * TIMES.double()) if regime == "nonlinear" else 0.5 * torch.exp(-4 * TIMES.double())
    assert torch.allclose(exact[:, 0], expected, atol=1e-12) and torch.allclose(near, exact, atol=1e-10)


@pytest.mark.parametrize("regime", ["linear", "nonlinear"])
def test_convergence_times_are_exact(regime):
    X, y, w0 = problem(4, 5, seed=3)
    tolerance = 1e-2
    times = convergence_times(X, y, w0, tolerance, regime)
    m = singular_modes(X, y)
    for k in range(4):
        theta = quadratic_modes(X, y, w0, times[k : k + 1], regime)[0, k]
        assert abs(abs(theta - m.limit[k]) - tolerance) < 1e-10 or times[k] == 0
    assert bool((times[:4] > 0).any()) and times[4] == 0
    null = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    decay = convergence_times(null, torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(2), tolerance, regime)
    theta = quadratic_modes(null, torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(2), decay[:1], regime)[0, 0]
    assert abs(theta - tolerance) < 1e-12


def test_sequential_learning_has_its_threshold_at_ratio_one():
    """At the time the first mode is learned, a faster mode is learned and a slower one is not, as the start shrinks."""
    for ratio, limit in ((0.7, 0.0), (1.3, 1.0)):
        shares = []
        for sigma in (1e-6, 1e-24):
            X, y = (
                torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)),
                torch.tensor([0.5, ratio], dtype=torch.float64),
            )
            w0 = torch.full((2,), sigma**0.5, dtype=torch.float64)
            t = convergence_times(X, y, w0, 0.01, "nonlinear")[0]
            shares.append(float(quadratic_modes(X, y, w0, t, "nonlinear")[0, 1]) / ratio)
        assert abs(shares[1] - limit) < 1e-4 and abs(shares[1] - limit) < abs(shares[0] - limit)


def test_example_one_reverses_the_order():
    data = reversed_modes(torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0], dtype=torch.float64))
    w0 = torch.full((5,), 1e-3**0.5, dtype=torch.float64)
    limit = singular_modes(data.X, data.y).limit
    linear = torch.stack(
        [convergence_times(data.X, data.y, w0, 0.1 * float(x), "linear")[k] for k, x in enumerate(limit)]
    )
    hasty = torch.stack(
        [convergence_times(data.X, data.y, w0, 0.1 * float(x), "nonlinear")[k] for k, x in enumerate(limit)]
    )
    assert torch.allclose(linear, torch.tensor([256.0, 288, 329, 384, 460], dtype=torch.float64), atol=0.6)
    assert torch.allclose(hasty, torch.tensor([0.921, 0.792, 0.700, 0.630, 0.577], dtype=torch.float64), atol=6e-4)


def test_example_two_fits_the_clean_examples_first():
    n, q, eta = 20, 5, 5.0
    data = label_noise(n, q, eta)
    m = singular_modes(data.X, data.y)
    assert torch.allclose(m.mu[:n], torch.tensor([n + eta**2] + [eta**2] * (n - 1), dtype=torch.float64))
    assert torch.allclose(m.target[0], torch.tensor((n - 2 * q) / n**0.5, dtype=torch.float64))
    first = m.predict(data.X, torch.nn.functional.one_hot(torch.tensor(0), 200).double() * m.limit.nan_to_num()[0])
    says = torch.where(data.typical, data.y, -data.y)
    assert torch.allclose(first, (1 - 2 * q / n) * says, atol=1e-10)
    # the eigenspace of eta^2 is rotated: the targets have one component in it
    assert (
        torch.allclose(m.target[1], torch.tensor(2 * (q * (n - q) / n) ** 0.5, dtype=torch.float64))
        and m.target[2:].max() < 1e-10
    )
    w0 = torch.full((200,), 1e-3**0.5, dtype=torch.float64)
    closed = quadratic_modes(data.X, data.y, w0, TIMES, "nonlinear")
    assert (closed - gradient_flow(data.X, data.y, w0, TIMES, "nonlinear")).abs().max() < 1e-6


def test_example_three_has_the_spectrum_of_the_paper():
    data = spurious_feature(20, 5, 0.5, 5.0)
    mu = singular_modes(data.X, data.y).mu
    expected = torch.tensor([46.514, 28.486] + [25.0] * 18, dtype=torch.float64)
    assert torch.allclose(mu[:20], expected, atol=1e-3) and bool((mu[20:] == 0).all())


def test_the_basis_does_not_depend_on_the_solver():
    data = label_noise(8, 2, 3.0, 12)
    order = torch.randperm(8)
    one, two = singular_modes(data.X, data.y), singular_modes(data.X[order], data.y[order])
    assert torch.allclose(one.directions[:, :8], two.directions[:, :8], atol=1e-8)


def test_errors():
    X, y, w0 = problem(3, 4)
    with pytest.raises(nng.ArgumentError, match="regime"):
        quadratic_modes(X, y, w0, TIMES, "lazy")
    with pytest.raises(nng.ArgumentError, match="w0"):
        quadratic_modes(X, y, w0[:3], TIMES)
    with pytest.raises(nng.ArgumentError, match="expected"):
        quadratic_modes(X, w0, w0, TIMES)
    with pytest.raises(nng.ArgumentError, match="tolerance"):
        convergence_times(X, y, w0, 0.0)
    with pytest.raises(nng.ArgumentError, match="descending"):
        reversed_modes(torch.tensor([1.0, 2.0]))
    with pytest.raises(nng.ArgumentError, match="exceptions"):
        label_noise(5, 6)
