"""What has a graph has the right gradient: products, forms, solves, log-determinants, in vectors, damping, factors."""

import copy
import pickle

import pytest
import torch
from cases import FUNCTION_SPACE, MAPS, PARAMETER_SPACE, STORED, representation
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck

import nngeom as nng

TIGHT = 1e-13  # of conjugate gradients, so that finite differences of a solve mean something
X = torch.float64


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()


def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, dtype=X, generator=g), torch.randint(0, 3, (n,), generator=g)) for n in (4, 3)]


MODEL, DATA = network(), batches()
D = sum(p.numel() for p in MODEL.parameters())


def fim(kind):
    return nng.FIM(MODEL, DATA, kind)


def jacobian(kind):
    return nng.Jacobian(MODEL, DATA, kind)


MATRICES = {name: lambda name=name: fim(representation(name, MODEL)) for name in PARAMETER_SPACE} | {
    "GGN": lambda: nng.GGN(MODEL, DATA, nng.PMatImplicit, loss="cross_entropy"),
    "Hessian": lambda: (
        nng.Hessian(MODEL, DATA, loss="cross_entropy")
        + 2 * nng.PMatEye.build(nng.LayerCollection.from_model(MODEL), dtype=X)
    ),
    "ImplicitHessian": lambda: nng.Hessian(MODEL, DATA, loss="cross_entropy"),
    "Covariance": lambda: nng.GradientCovariance(MODEL, DATA, nng.PMatImplicit, loss="cross_entropy"),
    "CovarianceLowRank": lambda: nng.GradientCovariance(MODEL, DATA, nng.PMatLowRank, loss="cross_entropy"),
    "sum": lambda: fim(nng.PMatKFAC) + fim(nng.PMatLowRank),
    "implicit sum": lambda: 2 * fim(nng.PMatImplicit) + fim(nng.PMatDiag) / 3,
    "difference": lambda: 2 * fim(nng.PMatDense) - fim(nng.PMatImplicit),
    "scaled": lambda: 0.3 * fim(nng.PMatImplicit),
    "scaled low rank": lambda: 0.3 * fim(nng.PMatLowRank),
    "inverse of dense": lambda: fim(nng.PMatDense).inverse(0.5),
    "inverse of low rank": lambda: fim(nng.PMatLowRank).inverse(0.5),
    "inverse of quasi-diagonal": lambda: MATRICES["quasi-diag"]().inverse(0.5),
    "inverse of kfac": lambda: fim(nng.PMatKFAC).inverse(0.5),
    "factored inverse": lambda: fim(nng.PMatKFAC).inverse(nng.FactoredTikhonov(0.5)),
    "inverse of implicit": lambda: fim(nng.PMatImplicit).inverse(0.5, tol=TIGHT),
    "inverse of hessian": lambda: nng.Hessian(MODEL, DATA, loss="cross_entropy").inverse(2.0, tol=TIGHT),
    "sum with an implicit inverse": lambda: fim(nng.PMatImplicit).inverse(0.5, tol=TIGHT) + fim(nng.PMatDiag),
    "product": lambda: fim(nng.PMatDense) @ fim(nng.PMatImplicit),
    "pull-push": lambda: (lambda j: j.T @ j)(jacobian(nng.PushForwardDense)),
    "implicit pull-push": lambda: (lambda j: j.T @ j)(jacobian(nng.PushForwardImplicit)),
}
KERNELS = {name: lambda kind=kind: nng.GramMatrix(MODEL, DATA, kind) for name, kind in FUNCTION_SPACE.items()} | {
    "centred implicit": lambda: nng.GramMatrix(MODEL, DATA, nng.FMatImplicit, centered=True),
    "sum": lambda: nng.GramMatrix(MODEL, DATA, nng.FMatImplicit) + 0.5 * nng.GramMatrix(MODEL, DATA),
}
ITERATIVE = ("implicit", "GGN", "ImplicitHessian", "Covariance", "scaled", "centred implicit")


@pytest.fixture(params=MATRICES)
def named(request):
    return request.param, MATRICES[request.param]()


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param, KERNELS[request.param]()


def vector(m, *batch, seed=2):
    return torch.randn(*batch, m.shape[0], dtype=X, generator=torch.Generator().manual_seed(seed))


def wrap(m, x):
    return (
        nng.PVector(m.layer_collection, x)
        if hasattr(m, "layer_collection")
        else nng.FVector(x.unflatten(-1, (m.outputs, m.columns)))
    )


def options(name):
    return {"tol": TIGHT} if name in ITERATIVE else {}


def same_derivatives(f, g, inputs, tol=1e-8):
    """Values, gradients, and gradients of the gradients of two scalar functions."""
    one, two = ([t.detach().clone().requires_grad_() for t in inputs] for _ in range(2))
    a, b = f(*one), g(*two)
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)
    for _ in (1, 2):
        da, db = (grad(y, t, create_graph=True, allow_unused=True) for y, t in ((a, one), (b, two)))
        for x, y, t in zip(da, db, inputs):
            x, y = (torch.zeros_like(t) if z is None else z for z in (x, y))
            torch.testing.assert_close(x, y, rtol=tol, atol=tol * (1 + float(y.detach().abs().max())))
        a, b = (
            sum((z * z.detach().cos()).sum() + z.square().sum() for z in d if z is not None and z.requires_grad)
            for d in (da, db)
        )
        if not (isinstance(b, torch.Tensor) and b.requires_grad):
            return
        assert isinstance(a, torch.Tensor) and a.requires_grad


def curved(x):
    """A number of a vector whose second derivatives in it do not vanish."""
    ramp = torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)
    return (x * ramp).sum() + (x * ramp).square().sum()


@pytest.mark.parametrize("batch", [(), (2,)])
def test_products(named, batch):
    _, m = named
    dense, v = m.to_dense().detach(), vector(m, *batch)
    same_derivatives(lambda x: curved(m.mv(wrap(m, x)).flat()), lambda x: curved(x @ dense.T), [v])
    same_derivatives(lambda x: curved((m @ wrap(m, x)).flat()), lambda x: curved(x @ dense.T), [v])


@pytest.mark.parametrize("batch", [(), (2,)])
def test_forms(named, batch):
    _, m = named
    dense, v = m.to_dense().detach(), vector(m, *batch).requires_grad_()
    same_derivatives(
        lambda x: m.vTMv(wrap(m, x)).square().sum(), lambda x: ((x @ dense.T) * x).sum(-1).square().sum(), [v]
    )
    expected = v @ (dense + dense.T)
    torch.testing.assert_close(grad(m.vTMv(wrap(m, v)).sum(), v)[0], expected, rtol=1e-9, atol=1e-9)


def test_solves_in_vector_and_damping(named):
    name, m = named
    dense, eye = m.to_dense().detach(), torch.eye(m.shape[0], dtype=X)
    lowest = max(0.0, -float(torch.linalg.eigvals(dense).real.min()))
    x, v = torch.tensor(0.3 + 2 * lowest, dtype=X), vector(m, 2)
    expected = lambda b, x: curved(torch.linalg.solve(dense + x * eye, b.T).T)
    same_derivatives(lambda b, x: curved(m.solve(wrap(m, b), x, **options(name)).flat()), expected, [v, x], 1e-6)
    if name != "product":
        more = options(name) if hasattr(m, "sweep") else {}
        same_derivatives(lambda b, x: curved(m.inverse(x, **more).mv(wrap(m, b)).flat()), expected, [v, x], 1e-6)
        same_derivatives(
            lambda b, x: m.inverse(x, **more).vTMv(wrap(m, b)).sum(),
            lambda b, x: (b * torch.linalg.solve(dense + x * eye, b.T).T).sum(),
            [v, x],
            1e-6,
        )


def test_log_determinants_in_damping(named):
    name, m = named
    if hasattr(m, "sweep"):
        with pytest.raises(nng.UnsupportedError):
            m.logdet(torch.tensor(0.1, requires_grad=True))
        return
    dense, eye = m.to_dense().detach(), torch.eye(m.shape[0], dtype=X)
    x = torch.tensor(0.3 + 2 * max(0.0, -float(torch.linalg.eigvals(dense).real.min())), dtype=X)
    same_derivatives(lambda x: m.logdet(x), lambda x: torch.linalg.slogdet(dense + x * eye)[1], [x])
    x = x.requires_grad_()
    torch.testing.assert_close(grad(m.logdet(x), x)[0], torch.linalg.inv(dense + x.detach() * eye).trace())
    if name != "product":
        same_derivatives(
            lambda x: m.inverse(x).logdet(0.1),
            lambda x: torch.linalg.slogdet(torch.linalg.inv(dense + x * eye) + 0.1 * eye)[1],
            [x],
        )


def test_samples_in_damping(named):
    name, m = named
    if hasattr(m, "sweep") or name == "product":
        return
    lowest = max(0.0, -float(torch.linalg.eigvalsh(m.to_dense().detach()).min()))
    draw = lambda x: m.sample(2, x, generator=torch.Generator().manual_seed(0)).flat()
    assert gradcheck(draw, torch.tensor(0.5 + 2 * lowest, dtype=X, requires_grad=True))


def test_in_the_factor_of_a_product(named):
    name, m = named
    dense, eye, v = m.to_dense().detach(), torch.eye(m.shape[0], dtype=X), vector(m)
    c, x = torch.tensor(1.7, dtype=X), 0.3 + 4 * max(0.0, -float(torch.linalg.eigvals(dense).real.min()))
    same_derivatives(lambda c: curved((c * m).mv(wrap(m, v)).flat()), lambda c: curved(c * dense @ v), [c])
    same_derivatives(lambda c: curved((m / c).mv(wrap(m, v)).flat()), lambda c: curved(dense @ v / c), [c])
    same_derivatives(lambda c: (c * m).trace(), lambda c: c * dense.trace(), [c])
    same_derivatives(lambda c: curved((c * m).diag().flat()), lambda c: curved(c * dense.diagonal()), [c])
    same_derivatives(
        lambda c: curved((c * m).solve(wrap(m, v), x, **options(name)).flat()),
        lambda c: curved(torch.linalg.solve(c * dense + x * eye, v)),
        [c],
        1e-6,
    )


@pytest.mark.parametrize("name", [*STORED, "inverse of dense", "inverse of low rank", "inverse of quasi-diagonal"])
def test_where_all_eigenvalues_are_equal(name):
    """The derivative in a factor that is zero: eigenvectors are not determined there, and what they make is."""
    m, c = MATRICES[name](), torch.tensor(0.0, dtype=X, requires_grad=True)
    dense, v, w = m.to_dense().detach(), vector(m), vector(m, seed=3)
    if name in ("kfac", "kfac-reduce"):
        with pytest.raises(nng.UnsupportedError, match="eigenvalues that repeat"):
            grad((c * m).solve(wrap(m, v), 0.5).flat() @ w, c)
        return
    for solved in ((c * m).solve(wrap(m, v), 0.5), (c * m).inverse(0.5).mv(wrap(m, v))):
        (slope,) = grad(solved.flat() @ w, c)
        torch.testing.assert_close(slope, -4 * (w @ dense @ v), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(grad((c * m).logdet(0.5), c)[0], 2 * dense.trace(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "block-diag", "mixed", "mixed-sweeps"])
def test_factored_damping(name):
    m = MATRICES[name]()
    v = vector(m).requires_grad_()
    x = torch.tensor(0.3, dtype=X, requires_grad=True)
    for balanced in (True, False):
        solve = lambda b, x, balanced=balanced: m.solve(wrap(m, b), nng.FactoredTikhonov(x, balanced)).flat()
        invert = lambda b, x, balanced=balanced: m.inverse(nng.FactoredTikhonov(x, balanced)).mv(wrap(m, b)).flat()
        for f in (solve, invert):
            assert gradcheck(f, (v, x)) and gradgradcheck(f, (v, x))


def test_large_sums_are_solved_with_the_same_derivatives(monkeypatch):
    import nngeom.pmat.expression as expression

    a, b = fim(nng.PMatImplicit), fim(nng.PMatDiag)
    da, db, eye = a.to_dense(), b.to_dense(), torch.eye(D, dtype=X)
    monkeypatch.setattr(expression, "DENSE_LIMIT", 3)
    v, x, c = vector(a), torch.tensor(0.3, dtype=X), torch.tensor(1.4, dtype=X)
    mine = lambda v, x, c: curved((c * (c * a + b / 2)).solve(wrap(a, v), x, tol=TIGHT).flat())
    same_derivatives(
        mine, lambda v, x, c: curved(torch.linalg.solve(c * (c * da + db / 2) + x * eye, v)), [v, x, c], 1e-6
    )
    with pytest.raises(nng.UnsupportedError, match="graph of its own"):
        (a + b.inverse(x.requires_grad_())).solve(wrap(a, v), 0.1)
    with torch.no_grad():
        solved = (a + b.inverse(x)).solve(wrap(a, v), 0.1, tol=TIGHT).flat()
    torch.testing.assert_close(solved, torch.linalg.solve(da + torch.linalg.inv(db + x.detach() * eye) + 0.1 * eye, v))


# -- function space ----------------------------------------------------------------------------------------------------


def test_kernels(kernel):
    name, k = kernel
    dense, eye, f = k.to_dense().detach(), torch.eye(k.shape[0], dtype=X), vector(k, 2)
    x = torch.tensor(0.7, dtype=X)
    same_derivatives(lambda f: curved(k.mv(wrap(k, f)).flat()), lambda f: curved(f @ dense), [f])
    same_derivatives(
        lambda f: k.vTMv(wrap(k, f)).square().sum(), lambda f: ((f @ dense) * f).sum(-1).square().sum(), [f]
    )
    expected = lambda f, x: curved(torch.linalg.solve(dense + x * eye, f.T).T)
    same_derivatives(lambda f, x: curved(k.solve(wrap(k, f), x, **options(name)).flat()), expected, [f, x], 1e-6)
    if not hasattr(k, "left"):
        same_derivatives(lambda x: k.logdet(x), lambda x: torch.logdet(dense + x * eye), [x])
    c = torch.tensor(1.3, dtype=X)
    same_derivatives(lambda c: curved((c * k).mv(wrap(k, f)).flat()), lambda c: curved(c * f @ dense), [c])
    same_derivatives(lambda c: (c * k).trace(), lambda c: c * dense.trace(), [c])
    same_derivatives(lambda c: curved((c * k).to_dense().flatten()), lambda c: curved(c * dense.flatten()), [c])
    solved = lambda c: curved((c * k).solve(wrap(k, f), 0.7, **options(name)).flat())
    same_derivatives(solved, lambda c: curved(torch.linalg.solve(c * dense + 0.7 * eye, f.T).T), [c], 1e-6)


def test_a_factor_with_a_graph_is_kept_by_materialize():
    k = KERNELS["implicit"]()
    same_derivatives(
        lambda c: (c * k).materialize().tensor.square().sum(),
        lambda c: c * c * k.to_dense().square().sum(),
        [torch.tensor(1.3, dtype=X)],
    )
    same_derivatives(
        lambda c: (c * k).diag().tensor.square().sum(),
        lambda c: (c * k.to_dense().diagonal()).square().sum(),
        [torch.tensor(1.3, dtype=X)],
    )


def test_kernels_between_two_sets():
    k = nng.GramMatrix(MODEL, DATA, nng.FMatImplicit, other=DATA[:1])
    dense = nng.GramMatrix(MODEL, DATA, other=DATA[:1]).to_dense()
    for mine, matrix in ((k, dense), (k.T, dense.T)):
        f = torch.randn(mine.outputs, mine.columns, dtype=X)
        same_derivatives(
            lambda f, k=mine: curved(k.mv(nng.FVector(f)).flat()), lambda f, m=matrix: curved(m @ f.flatten()), [f]
        )


@pytest.mark.parametrize("kind", MAPS)
def test_maps(kind):
    push, pull = map(jacobian, MAPS[kind])
    rows = jacobian(nng.PushForwardDense).rows()
    v, u = vector(fim(nng.PMatDiag), 2), torch.randn(2, *push.shape[:2], dtype=X)
    same_derivatives(
        lambda v: curved(push.mv(nng.PVector(push.layer_collection, v)).flat()), lambda v: curved(v @ rows.T), [v]
    )
    same_derivatives(lambda u: curved(pull.mv(nng.FVector(u)).flat()), lambda u: curved(u.flatten(1) @ rows), [u])


# -- what autograd's own tools make of it ------------------------------------------------------------------------------


def test_checked_by_finite_differences():
    m, v = fim(nng.PMatImplicit), vector(fim(nng.PMatDiag)).requires_grad_()
    x = torch.tensor(0.4, dtype=X, requires_grad=True)
    form, solve = lambda v: m.vTMv(wrap(m, v)), lambda v, x: m.solve(wrap(m, v), x, tol=TIGHT).flat()
    assert gradcheck(form, v) and gradgradcheck(form, v) and gradcheck(solve, (v, x)) and gradgradcheck(solve, (v, x))


@pytest.mark.parametrize("name", ["implicit", "ImplicitHessian", "kfac", "low-rank"])
def test_transforms(name):
    m = MATRICES[name]()
    dense, v = m.to_dense(), vector(m)
    form = lambda v: m.vTMv(wrap(m, v))
    torch.testing.assert_close(torch.autograd.functional.hessian(form, v), 2 * dense)
    torch.testing.assert_close(torch.func.grad(form)(v), 2 * dense @ v)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(form))(v), 2 * dense)
    torch.testing.assert_close(torch.func.vmap(form)(torch.stack([v, 2 * v])), torch.stack([form(v), form(2 * v)]))


@pytest.mark.parametrize("name", PARAMETER_SPACE)
def test_forward_mode(name):
    """Stored matrices have it, in vector, damping and factor; implicit ones say that they have not."""
    m, x = MATRICES[name](), torch.tensor(0.4, dtype=X)
    dense, v, eye = m.to_dense(), vector(m), torch.eye(D, dtype=X)
    for refused, mine, theirs, at in (
        (True, lambda v: m.vTMv(wrap(m, v)), lambda v: v @ dense @ v, v),
        (True, lambda x: m.solve(wrap(m, v), x).flat(), lambda x: torch.linalg.solve(dense + x * eye, v), x),
        (False, lambda c: (c * m).mv(wrap(m, v)).flat(), lambda c: c * dense @ v, x),
    ):
        if name == "implicit" and refused:
            with pytest.raises(nng.UnsupportedError, match="reverse"):
                torch.func.jvp(mine, (at,), (torch.ones_like(at),))
        else:
            found, expected = (torch.func.jvp(f, (at,), (torch.ones_like(at),)) for f in (mine, theirs))
            torch.testing.assert_close(found, expected)


def test_overwritten_parameters_are_noticed():
    model = network()
    m = nng.FIM(model, DATA, nng.PMatImplicit)
    v = vector(m).requires_grad_()
    value = m.vTMv(wrap(m, v))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# -- damping -----------------------------------------------------------------------------------------------------------


def test_damping_as_a_tensor_without_a_gradient():
    m, v = fim(nng.PMatKFAC), vector(fim(nng.PMatDiag))
    for x in (torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.3, requires_grad=True).detach()):
        assert isinstance(nng.Tikhonov(0.3), nng.Tikhonov) and torch.equal(m.logdet(x), m.logdet(float(x)))
        assert torch.equal(m.solve(wrap(m, v), x).flat(), m.solve(wrap(m, v), float(x)).flat())
    with torch.no_grad():
        assert not m.logdet(torch.tensor(0.3, requires_grad=True)).requires_grad


def test_damping_that_makes_no_sense():
    m = fim(nng.PMatDense)
    with pytest.raises(nng.DampingError):
        m.logdet(torch.tensor(-1.0, requires_grad=True))
    with pytest.raises(nng.ArgumentTypeError):
        m.logdet(torch.ones(2, requires_grad=True))
    with pytest.raises(nng.ArgumentTypeError):
        m.logdet(None)
    with pytest.raises(nng.ArgumentError, match="Cutoff"):
        m.solve(wrap(m, vector(m)), nng.Cutoff(torch.tensor(0.1, requires_grad=True)))


@pytest.mark.parametrize("name", [*STORED, "sum"])
def test_a_damping_too_small_raises_whatever_it_is(name):
    m = MATRICES[name]() - 2 * MATRICES[name]()  # negative
    for x in (1e-3, torch.tensor(1e-3, requires_grad=True)):
        solve = lambda x=x: m.solve(wrap(m, vector(m)), x)
        for operation in (solve, lambda x=x: m.inverse(x), lambda x=x: m.sample(1, x)):
            with pytest.raises(nng.SingularError):
                operation()
        assert float(m.logdet(x).detach()) == -torch.inf


def test_dtypes_of_damping_and_matrix():
    for dtype in (torch.float32, X):
        m = fim(nng.PMatKFAC).to(torch.float32)
        v, x = vector(m).float(), torch.tensor(0.3, dtype=dtype, requires_grad=True)
        y = m.solve(wrap(m, v), x)
        assert y.dtype == torch.float32 and m.logdet(x).dtype == torch.float32
        slope = grad(y.flat().sum(), x)[0]
        twice = m.to(X).solve(m.to(X).solve(wrap(m, v.to(X)), 0.3), 0.3).flat().sum()
        torch.testing.assert_close(slope, -twice.to(dtype), rtol=1e-4, atol=1e-4)


def test_multiples_of_the_identity_with_a_graph(monkeypatch):
    import nngeom.pmat.expression as expression

    lc = nng.LayerCollection.from_model(MODEL)
    eye = torch.eye(D, dtype=X)
    for limit in (expression.DENSE_LIMIT, 3):
        monkeypatch.setattr(expression, "DENSE_LIMIT", limit)
        for kind in (nng.PMatDense, nng.PMatImplicit, nng.PMatKFAC):
            m, v = fim(kind), vector(fim(nng.PMatDiag))
            dense = m.to_dense()
            mine = lambda x, m=m, v=v: (m + nng.PMatEye.build(lc, x, dtype=X)).solve(wrap(m, v), 0.0, tol=TIGHT).flat()
            same_derivatives(
                lambda x, f=mine: curved(f(x)),
                lambda x, d=dense, v=v: curved(torch.linalg.solve(d + x * eye, v)),
                [torch.tensor(0.4, dtype=X)],
                1e-6,
            )


def test_solves_with_a_preconditioner():
    m, v, x = fim(nng.PMatImplicit), vector(fim(nng.PMatDiag)), torch.tensor(0.05, dtype=X)
    dense, other, eye = m.to_dense(), fim(nng.PMatKFAC), torch.eye(D, dtype=X)
    same_derivatives(
        lambda v, x: curved(m.solve(wrap(m, v), x, tol=TIGHT, preconditioner=other).flat()),
        lambda v, x: curved(torch.linalg.solve(dense + x * eye, v)),
        [v, x],
        1e-6,
    )


@pytest.mark.parametrize("name", ["dense", "kfac", "low-rank", "implicit"])
def test_solves_of_all_rows_at_once(name):
    m, j = MATRICES[name](), jacobian(nng.PushForwardDense)
    dense, eye = m.to_dense(), torch.eye(D, dtype=X)
    same_derivatives(
        lambda x: m.solve(j, x, **options(name)).tensor.square().sum(),
        lambda x: torch.linalg.solve(dense + x * eye, j.rows().T).square().sum(),
        [torch.tensor(0.4, dtype=X)],
        1e-6,
    )


@pytest.mark.parametrize("name", STORED)
def test_a_matrix_with_a_graph_is_detached_copied_and_kept(name, tmp_path):
    x = torch.tensor(0.4, dtype=X, requires_grad=True)
    m = MATRICES[name]().inverse(x)
    assert m.trace().requires_grad and not m.detach().trace().requires_grad
    nng.save(m, tmp_path / "m")
    for copied in (m.detach(), pickle.loads(pickle.dumps(m)), copy.deepcopy(m), nng.load(tmp_path / "m")):
        assert type(copied) is type(m) and not copied.trace().requires_grad
        assert torch.equal(copied.to_dense(), m.to_dense().detach())
        assert torch.equal((2 * copied).to_dense(), (2 * m).to_dense().detach())


def test_laplace_evidence():
    """The derivative of the log-evidence in the log prior precision, as MacKay's fixed point has it."""
    n, w = sum(len(x) for x, _ in DATA), nng.PVector.from_model(MODEL)
    for kind in (nng.PMatDense, nng.PMatKFAC, nng.PMatEKFAC, nng.PMatLowRank, nng.PMatDiag):
        m = n * nng.GGN(MODEL, DATA, kind, loss="cross_entropy")
        log_prior = torch.tensor(0.2, dtype=X, requires_grad=True)
        evidence = 0.5 * (D * log_prior - log_prior.exp() * w.dot(w) - m.logdet(log_prior.exp()))
        prior = log_prior.detach().exp()
        spread = torch.linalg.inv(m.to_dense() + prior * torch.eye(D, dtype=X)).trace()
        torch.testing.assert_close(grad(evidence, log_prior)[0], 0.5 * (D - prior * w.dot(w) - prior * spread))


# -- live vectors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PARAMETER_SPACE, "implicit sum"])
def test_the_penalty_of_elastic_weight_consolidation(name):
    m, model = MATRICES[name](), network()
    anchor = nng.PVector.from_model(MODEL)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.linspace(-0.1, 0.2, p.numel(), dtype=X).view(p.shape))
    live = nng.PVector.from_model(model, live=True)
    away = live - anchor
    (3 * m.vTMv(away)).backward()
    expected = 6 * m.to_dense() @ away.flat().detach()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected)
    torch.testing.assert_close(grad(live.flat().square().sum(), model[0].weight)[0], 2 * model[0].weight)
    assert not nng.PVector.from_model(model).flat().requires_grad
    assert not nng.PVector.from_model(model, live=False).flat().requires_grad


def test_live_vectors_of_some_parameters():
    model = network()
    lc = nng.LayerCollection.from_model(model, include="2.weight")
    live, still = (nng.PVector.from_model(model, lc, live=live) for live in (True, False))
    live["2.weight"].sum().backward()
    assert torch.equal(model[2].weight.grad, torch.ones(3, 2, dtype=X)) and model[0].weight.grad is None
    with torch.no_grad():
        model[2].weight.zero_()
    assert bool(still.flat().abs().min() > 0)  # a copy


def test_a_sum_in_a_factor_of_zero():
    kfac, low = fim(nng.PMatKFAC), fim(nng.PMatLowRank)
    c = torch.tensor(0.0, dtype=X, requires_grad=True)
    (slope,) = grad((kfac + c * low).logdet(0.5), c)
    damped = kfac.to_dense() + 0.5 * torch.eye(D, dtype=X)
    torch.testing.assert_close(slope, torch.linalg.solve(damped, low.to_dense()).trace(), rtol=1e-8, atol=1e-8)
    with pytest.raises(nng.UnsupportedError, match=r"factor of zero|repeat"):
        grad((c * (kfac + low)).logdet(0.5), c)
