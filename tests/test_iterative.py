"""Solves by products: first guesses, bounds on the steps, what was reached, and matrices with negative eigenvalues."""

import pytest
import reference
import torch
from cases import build
from test_lanczos import matrix_of

import nngeom as nng
from nngeom.solve.cg import conjugate_gradient
from nngeom.solve.minres import minres

f64 = torch.float64
D = 50
POSITIVE = matrix_of(torch.linspace(0.1, 5, D, dtype=f64))
SIGNED = matrix_of(torch.cat([torch.linspace(-3, -0.2, 20, dtype=f64), torch.linspace(0.1, 5, 30, dtype=f64)]))
B = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0), dtype=f64)


class Counted:
    """Products with a matrix, counted."""

    def __init__(self, m):
        self.m, self.products = m, 0

    def __call__(self, x):
        self.products += 1
        return x @ self.m


def solved(m, b):
    return torch.linalg.solve(m, b.reshape(-1, D).T).T.reshape(b.shape)


@pytest.mark.parametrize("solver, m", [(conjugate_gradient, POSITIVE), (minres, POSITIVE), (minres, SIGNED)])
def test_against_a_dense_solve(solver, m):
    for tol in (1e-4, 1e-10):
        x = solver(lambda y: y @ m, B, tol)
        residual = (B - x @ m).norm(dim=-1) / B.norm(dim=-1)
        assert float(residual.max()) <= tol * (1 + 1e-6)
    torch.testing.assert_close(x, solved(m, B), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver, m", [(conjugate_gradient, POSITIVE), (minres, SIGNED)])
def test_guesses_save_steps(solver, m):
    plain, near, there = Counted(m), Counted(m), Counted(m)
    x = solver(plain, B, 1e-8)
    noise = torch.randn(B.shape, generator=torch.Generator().manual_seed(1), dtype=f64)
    solver(near, B, 1e-8, x0=x + 1e-5 * noise)
    solver(there, B, 1e-6, x0=x)
    assert near.products < plain.products and there.products == 1


@pytest.mark.parametrize("solver, m", [(conjugate_gradient, POSITIVE), (minres, SIGNED)])
def test_steps_are_bounded_and_what_was_reached_is_told(solver, m):
    for steps in (0, 1, 5):
        counted = Counted(m)
        with pytest.raises(nng.ConvergenceError, match=f"in {steps} steps") as caught:
            solver(counted, B, 1e-12, max_steps=steps)
        assert counted.products <= steps + 2
        x, residual = caught.value.iterate, caught.value.residual
        assert x.shape == B.shape and residual.shape == B.shape[:-1]
        torch.testing.assert_close(residual, (B - x @ m).norm(dim=-1) / B.norm(dim=-1))
        assert torch.equal(solver(lambda y: y @ m, B, 1e-12, max_steps=steps, strict=False), x)


def test_vectors_of_a_batch_do_not_disturb_each_other():
    b = B.clone()
    b[0, 0] = 0
    values, vectors = torch.linalg.eigh(SIGNED)
    b[0, 1], b[0, 2] = vectors[:, 0], 1e-9 * B[0, 2]
    for m, solver in ((POSITIVE, conjugate_gradient), (SIGNED, minres)):
        x = solver(lambda y, m=m: y @ m, b, 1e-10)
        assert not bool(x[0, 0].any())
        assert float(((b - x @ m).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-300)).max()) <= 1.01e-10


def test_minres_needs_as_many_steps_as_there_are_eigenvalues():
    m = matrix_of(torch.tensor([-2.0, 1.0, 3.0, 5.0], dtype=f64).repeat_interleave(10))
    counted = Counted(m)
    minres(counted, torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=f64), 1e-10)
    assert counted.products <= 6


def test_minres_of_ill_conditioned_matrices():
    values = torch.cat([-torch.logspace(-4, 0, 25, dtype=f64), torch.logspace(-4, 0, 25, dtype=f64)])
    m = matrix_of(values)
    x = minres(lambda y: y @ m, B, 1e-9)
    assert float(((B - x @ m).norm(dim=-1) / B.norm(dim=-1)).max()) <= 1e-9


@pytest.mark.parametrize("rank", [0, 1, 20])
def test_minres_of_singular_matrices(rank):
    values = torch.zeros(D, dtype=f64)
    values[:rank] = torch.linspace(-2, 3, rank, dtype=f64)
    m = matrix_of(values)
    with pytest.raises(nng.SingularError, match="singular"):
        minres(lambda y: y @ m, B, 1e-8)


def test_not_finite():
    for solver in (conjugate_gradient, minres):
        with pytest.raises(nng.NonFiniteError):
            solver(lambda y: y * float("nan"), B)
        with pytest.raises(nng.NonFiniteError):
            solver(lambda y: y, B * float("nan"))


@pytest.mark.parametrize("steps", [-1, 1.5, True])
def test_bad_bounds(steps):
    for solver in (conjugate_gradient, minres):
        with pytest.raises(nng.ArgumentError, match="max_steps is"):
            solver(lambda y: y, B, max_steps=steps)


# -- of matrices and kernels -------------------------------------------------------------------------------------------


def cubic(outputs, targets):
    return (outputs**3).sum(1) + outputs[:, 0] * outputs[:, 1]


@pytest.fixture(scope="module")
def hessian():
    """An implicit Hessian with negative eigenvalues, and its entries."""
    c = build("mlp")
    return nng.Hessian(c.model, c.loader, loss=cubic), reference.hessian(c.model, c.inputs, c.targets, cubic)


def test_indefinite_hessians(hessian):
    m, h = hessian
    damping = 0.05
    shifted = h + damping * torch.eye(len(h), dtype=f64)
    values = torch.linalg.eigvalsh(shifted)
    assert float(values.min()) < 0 and float(values.abs().min()) > 1e-6
    v = nng.PVector.randn(m.layer_collection, 2, dtype=f64)
    expected = torch.linalg.solve(shifted, v.flat().T).T
    close = lambda x, y: torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    close(m.solve(v, damping, tol=1e-11, indefinite=True).flat(), expected)
    close(m.inverse(damping, indefinite=True, tol=1e-11).mv(v).flat(), expected)
    with pytest.raises(nng.SingularError, match="indefinite=True"):
        m.solve(v, damping)


def test_gradients_of_indefinite_solves(hessian):
    m, h = hessian
    x = torch.tensor(0.05, dtype=f64, requires_grad=True)
    v = torch.randn(len(h), dtype=f64, requires_grad=True)
    b = nng.PVector(m.layer_collection, v)
    loss = m.solve(b, x, tol=1e-12, indefinite=True, x0=b).flat().sum()
    got = torch.autograd.grad(loss, (v, x))
    inverse = torch.linalg.inv(h + x * torch.eye(len(h), dtype=f64))
    expected = torch.autograd.grad((inverse @ v).sum(), (v, x))
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6 * float(e.abs().max()))


@pytest.fixture(scope="module", params=["matrix", "kernel"])
def positive(request):
    """An implicit matrix or kernel, its entries, and vectors."""
    c = build("mlp")
    if request.param == "matrix":
        m = nng.FIM(c.model, c.loader, nng.PMatImplicit)
        return m, m.to_dense(), nng.PVector.randn(m.layer_collection, 2, dtype=f64)
    k = nng.GramMatrix(c.model, c.loader, nng.FMatImplicit)
    return k, k.to_dense(), nng.FVector(torch.randn(2, k.outputs, k.columns, dtype=f64))


def test_truncated_solves(positive):
    m, dense, v = positive
    full = m.solve(v, 0.1, tol=1e-10)
    with pytest.raises(nng.ConvergenceError, match="max_steps") as caught:
        m.solve(v, 0.1, tol=1e-10, max_steps=2)
    reached, residual = caught.value.iterate, caught.value.residual
    assert type(reached) is type(v) and reached.shape == v.shape and residual.shape == (2,)
    damped = dense + 0.1 * torch.eye(len(dense), dtype=f64)
    flat = lambda x: x.flat().reshape(2, -1)
    torch.testing.assert_close(residual, (flat(v) - flat(reached) @ damped).norm(dim=1) / flat(v).norm(dim=1))
    again = m.solve(v, 0.1, tol=1e-10, max_steps=2, strict=False)
    assert torch.equal(flat(again), flat(reached))
    torch.testing.assert_close(flat(m.solve(v, 0.1, x0=full, max_steps=0)), flat(full))
    torch.testing.assert_close(flat(m.solve(v, 0.1, x0=reached, tol=1e-10)), flat(full))
    torch.testing.assert_close(flat(m.solve(v, 0.1, indefinite=True, tol=1e-10)), flat(full))


def test_bad_guesses(positive):
    m, _, v = positive
    with pytest.raises(nng.ArgumentError, match=r"x0 has shape .* expected that of b"):
        m.solve(v, 0.1, x0=v + v if v.shape[0] != 2 else type(v)(*_first(v)))
    with pytest.raises(nng.ArgumentTypeError):
        m.solve(v, 0.1, x0=torch.zeros(3))


def _first(v):
    return (v.layer_collection, v.flat()[0]) if isinstance(v, nng.PVector) else (v.tensor[0],)


def test_what_does_not_go_together():
    c = build("mlp")
    m = nng.FIM(c.model, c.loader, nng.PMatImplicit)
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    with pytest.raises(nng.ArgumentError, match="no preconditioner"):
        m.solve(v, 0.1, preconditioner=nng.FIM(c.model, c.loader), indefinite=True)
    with pytest.raises(nng.ArgumentError, match="no x0="):
        m.inverse(0.1, x0=v)
    with pytest.raises(nng.ConvergenceError):
        m.inverse(0.1, max_steps=1).mv(v)
