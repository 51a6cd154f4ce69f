"""Sums of stored matrices, block by block: every pair of representations against the dense sum."""

import functools
import itertools

import pytest
import torch
from cases import STORED, build, representation

import nngeom as nng
from nngeom.pmat import sum_block

f64 = torch.float64
MODELS = ("mlp", "conv2d", "layer-norm", "language-model")
PAIRS = list(itertools.combinations_with_replacement(STORED, 2))


@functools.cache
def matrix(name, kind, seed=0):
    torch.set_num_threads(1)
    case = build(name, sizes=(3, 4) if not seed else (5,))
    return nng.FIM(case.model, case.loader, representation(kind, case.model))


@pytest.fixture(params=[False, True], ids=["direct", "iterated"])
def iterated(request, monkeypatch):
    """Whether all blocks are taken to be too large to be factorised at once."""
    if request.param:
        monkeypatch.setattr(sum_block, "ITERATED", 1)
        monkeypatch.setattr("nngeom.pmat.partitioned.ITERATED", 1)
    return request.param


def close(x, y, tol=1e-8):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def damping_of(dense):
    return 0.1 + 1.1 * max(0.0, -float(torch.linalg.eigvalsh(dense).min()))


def vectors(m, *batch):
    return nng.PVector.randn(m.layer_collection, *batch, dtype=f64, generator=torch.Generator().manual_seed(3))


def require_all(m, dense, damping):
    """Every operation against the dense sum."""
    v, eye = vectors(m, 2), torch.eye(len(dense), dtype=f64)
    damped = dense + damping * eye
    close(m.mv(v).flat(), v.flat() @ dense)
    close(m.vTMv(v), ((v.flat() @ dense) * v.flat()).sum(-1))
    close(m.trace(), dense.trace())
    close(m.diag().flat(), dense.diagonal())
    close(m.norm(), dense.norm())
    close(m.to_dense(), dense)
    expected = torch.linalg.solve(damped, v.flat().T).T
    close(m.solve(v, damping).flat(), expected)
    close(m.inverse(damping).mv(v).flat(), expected)
    close(m.logdet(damping), torch.linalg.slogdet(damped)[1])
    values, basis = m.eigh()
    close(values, torch.linalg.eigvalsh(dense))
    u = basis.to_dense()
    close(u.T @ u, eye)
    close((u * values) @ u.T, dense)
    require_covariance(m, damped, damping)


def require_covariance(m, damped, damping):
    """Draws are a linear map of white noise: read it off, and multiply it by its transpose."""
    d, calls = len(damped), []

    def unit(*args, **kwargs):
        calls.append(None)
        return nng.PVector.from_flat(m.layer_collection, torch.zeros(args[1], d, dtype=f64))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nng.PVector, "randn", unit)
        m.sample(1, damping)
    many = len(calls)

    def columns(*args, **kwargs):
        calls.append(None)
        rows = torch.zeros(many * d, d, dtype=f64)
        rows[(len(calls) - 1) * d : len(calls) * d] = torch.eye(d, dtype=f64)
        return nng.PVector.from_flat(m.layer_collection, rows)

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nng.PVector, "randn", columns)
        root = m.sample(many * d, damping).flat()
    assert len(calls) == many
    close(root.T @ root, torch.linalg.inv(damped), 1e-6)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("name", MODELS)
def test_pairs(name, pair, iterated):
    x, y = matrix(name, pair[0]), matrix(name, pair[1], 1)
    dense = x.to_dense() + 0.5 * y.to_dense()
    require_all(x + 0.5 * y, dense, damping_of(dense))


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("name", MODELS[:2])
def test_differences(name, pair, iterated):
    x, y = matrix(name, pair[0]), matrix(name, pair[1], 1)
    dense = x.to_dense() - 2 * y.to_dense()
    m = x - 2 * y
    require_all(m, dense, damping_of(dense))
    least = float(torch.linalg.eigvalsh(dense).min())
    assert least < 0
    for solve in (lambda x: m.solve(vectors(m), x), lambda x: m.inverse(x), lambda x: m.sample(1, x)):
        with pytest.raises(nng.SingularError) as error:
            solve(-0.5 * least)
        if error.value.needed is not None:
            assert error.value.needed == pytest.approx(-least, rel=1e-6)


# -- many, large, undamped ---------------------------------------------------------------------------------------------


def of_random_factors(like, seed, rank=None):
    """A KFAC matrix with random factors, definite or of some rank."""
    g = torch.Generator().manual_seed(seed)

    def factor(f):
        x = torch.randn(f.shape[-1], rank or 2 * f.shape[-1], generator=g, dtype=f64)
        return (x @ x.T / x.shape[1])[None]

    blocks = {lay: type(b)(factor(b.a), factor(b.g)) for lay, b in like.blocks.items()}
    return type(like).of_blocks(like.layer_collection, blocks, 10)


@functools.cache
def wide():
    """A net with blocks of 1056 and 330 parameters, and its KFAC matrix."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)).double()
    data = [(torch.randn(40, 32, dtype=f64), torch.zeros(40, dtype=torch.long))]
    return model, data, nng.FIM(model, data, nng.PMatKFAC)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.entries = max(self.entries, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_many_tasks_with_a_prior():
    _, _, like = wide()
    tasks = [of_random_factors(like, seed) for seed in range(20)]
    prior = nng.PMatEye.build(like.layer_collection, 0.3, dtype=f64)
    diag = nng.FIM(*wide()[:2], nng.PMatDiag)
    m = sum(tasks) + prior + diag - 0.5 * diag
    dense = sum(map(nng.PMatKFAC.to_dense, tasks)) + prior.to_dense() + 0.5 * diag.to_dense()
    assert len(m.parts) == 23
    v = vectors(m, 2)
    close(m.solve(v, 0.1).flat(), torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=f64), v.flat().T).T)
    close(m.norm(), dense.norm())
    close(m.logdet(), torch.linalg.slogdet(dense)[1])


def test_nothing_of_the_square_of_a_block():
    model, data, like = wide()
    kinds = (nng.PMatDiag, nng.PMatEKFAC, nng.PMatQuasiDiag, nng.PMatEye)
    others = [of_random_factors(like, 1), *(nng.FIM(model, data, kind) for kind in kinds)]
    other = nng.FIM(model, [(x[:3], y[:3]) for x, y in data], nng.PMatLowRank)
    v = vectors(like)
    for m in (like + x for x in (*others, other)):
        expected = torch.linalg.solve(m.to_dense() + torch.eye(m.shape[0], dtype=f64), v.flat())
        with Largest() as largest:
            close(m.solve(v, 1.0).flat(), expected)
            m.trace(), m.diag(), m.vTMv(v), m.norm()
            m.sample(1, 1.0)
            m.solve(v, 1.0)
        assert largest.entries < 1056**2 / 4, m


@pytest.mark.parametrize("kind", [nng.PMatDiag, nng.PMatQuasiDiag])
def test_estimates_of_nothing_of_the_square(kind):
    model, data, like = wide()
    m = like + nng.FIM(model, data, kind)
    expected = torch.linalg.slogdet(m.to_dense() + torch.eye(m.shape[0], dtype=f64))[1]
    with Largest() as largest:
        found = m.logdet(1.0, estimator="slq", steps=8, generator=torch.Generator().manual_seed(0))
    assert largest.entries < 1056**2 / 4
    assert abs(float(found) - float(expected)) <= 5 * float(found.standard_error)


def test_only_blocks_are_made_dense():
    _, _, like = wide()
    m = like + of_random_factors(like, 2)
    dense = m.to_dense() + 0.1 * torch.eye(m.shape[0], dtype=f64)
    with Largest() as largest:
        logdet = m.logdet(0.1)
        m.inverse(0.1)
        values, _ = m.eigh()
    assert largest.entries <= 1056**2
    close(logdet, torch.linalg.slogdet(dense)[1])
    close(values, torch.linalg.eigvalsh(dense) - 0.1)


@pytest.mark.parametrize("sign", [1.0, -1e-6])
def test_two_kronecker_products_without_damping(sign, monkeypatch):
    """One is definite, the other of low rank: brought to diagonal form together."""
    _, _, like = wide()
    sure, other = of_random_factors(like, 3), of_random_factors(like, 4, rank=3)
    dense = sure.to_dense() + sign * other.to_dense()
    expected, v = torch.linalg.inv(dense), vectors(sure, 2)
    monkeypatch.setattr(sum_block, "ITERATED", 1)
    monkeypatch.setattr(sum_block.SumBlock, "grouped", lambda *args: pytest.fail("dense"))
    for m in (sure + sign * other, sign * other + sure):
        close(m.solve(v).flat(), v.flat() @ expected, 1e-6)
        close(m.logdet(), torch.linalg.slogdet(dense)[1])
        inverse = m.inverse()
        close(inverse.to_dense(), expected, 1e-6)
        close(inverse.diag().flat(), expected.diagonal(), 1e-6)
        close(inverse.norm(), expected.norm(), 1e-6)
    assert torch.isfinite(m.sample(3).flat()).all()


def test_little_damping_is_solved_to_the_same_accuracy():
    """Where iterations do not converge, the dense block is taken."""
    _, _, like = wide()
    m = of_random_factors(like, 5, rank=4) + of_random_factors(like, 6, rank=5)
    dense, v = m.to_dense(), vectors(m)
    for damping in (1e-2, 1e-4, 1e-6):
        damped = dense + damping * torch.eye(len(dense), dtype=f64)
        residual = damped @ m.solve(v, damping).flat() - v.flat()
        assert float(residual.norm()) < 1e-8 * float(v.norm())
    with pytest.raises(nng.SingularError):
        m.solve(v)


def test_above_the_limit():
    _, _, like = wide()
    m = like + of_random_factors(like, 7)
    v, dense = vectors(m), m.to_dense()
    for call in (m.logdet, m.inverse):
        with pytest.raises(nng.SizeError, match="side 1056; the limit is 500: pass limit=1056"):
            call(0.1, limit=500)
    with pytest.raises(nng.SizeError, match="PMatEKFAC"):
        m.eigh(limit=500)
    with pytest.raises(nng.SizeError):
        m.solve(v, nng.Cutoff(0.1), limit=500)
    close(m.solve(v, 0.1, limit=500).flat(), torch.linalg.solve(dense + 0.1 * torch.eye(1386, dtype=f64), v.flat()))
    assert torch.isfinite(m.sample(2, 0.1, limit=500).flat()).all()
    rough = m.solve(v, 0.1, tol=0.1, limit=500).flat()
    assert 1e-8 < float((dense @ rough + 0.1 * rough - v.flat()).norm()) / float(v.norm()) < 0.3
    with pytest.raises(nng.ConvergenceError):
        m.solve(v, 1e-6, tol=1e-12, max_steps=1, limit=500)
    for limit in (0, -3, 1.5, None, True):
        with pytest.raises(nng.ArgumentError, match="limit is"):
            m.solve(v, 0.1, limit=limit)
    for bad in (-1.0, float("nan")):
        with pytest.raises(nng.DampingError):
            m.logdet(bad)


def test_float32():
    _, _, like = wide()
    m = like + of_random_factors(like, 8)
    single = m.to(torch.float32)
    v = vectors(m)
    x = single.solve(v, 0.1).flat()
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), m.solve(v, 0.1).flat(), rtol=1e-3, atol=1e-3)
    assert (like.to(torch.float32) + m).dtype == f64


def test_gradients_of_iterated_solves():
    _, _, like = wide()
    other = of_random_factors(like, 9)
    dense = [like.to_dense(), other.to_dense()]
    v, x, c = vectors(like), torch.tensor(0.3, dtype=f64), torch.tensor(1.4, dtype=f64)
    eye = torch.eye(len(dense[0]), dtype=f64)
    slopes = []
    for solve in (
        lambda b, x, c: (like + c * other).solve(nng.PVector(v.layer_collection, b), x).flat(),
        lambda b, x, c: torch.linalg.solve(dense[0] + c * dense[1] + x * eye, b),
    ):
        arguments = [t.clone().requires_grad_() for t in (v.flat(), x, c)]
        slopes.append(torch.autograd.grad(solve(*arguments).square().sum(), arguments))
    for mine, theirs in zip(*slopes):
        close(mine, theirs, 1e-6)


def test_files_hold_sums_and_their_inverses(tmp_path):
    for kinds in (("kfac", "diag"), ("kfac", "low-rank"), ("block-diag", "kfac"), ("quasi-diag", "mixed")):
        m = matrix("mlp", kinds[0]) - 0.1 * matrix("mlp", kinds[1], 1)
        for saved in (m, m.inverse(10.0)):
            nng.save(saved, tmp_path / "m")
            assert torch.equal(nng.load(tmp_path / "m").to_dense(), saved.to_dense())
            assert saved.to(torch.float32).to_dense().dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_a_multiple_of_the_identity(name, iterated):
    x, y = matrix(name, "kfac"), matrix(name, "kfac", 1)
    eye = nng.PMatEye.build(x.layer_collection, 3.0, dtype=f64)
    z = matrix(name, "diag", 1)
    dense = x.to_dense() + 0.5 * y.to_dense() + z.to_dense() + 6 * torch.eye(len(x.to_dense()), dtype=f64)
    require_all(x + 0.5 * y + z + 2 * eye, dense, 0.1)


def test_the_derivative_in_a_multiple_of_the_identity(iterated):
    x, y, v = matrix("mlp", "kfac"), matrix("mlp", "kfac", 1), vectors(matrix("mlp", "kfac"))
    c = torch.tensor(3.0, dtype=f64, requires_grad=True)
    m = x + 0.5 * y + nng.PMatEye.build(x.layer_collection, c, dtype=f64)
    solved = m.solve(v, 0.1)
    inverse = torch.linalg.inv((x + 0.5 * y).to_dense() + 3.1 * torch.eye(len(v.flat()), dtype=f64))
    close(solved.flat().detach(), inverse @ v.flat())
    close(torch.autograd.grad(solved.dot(v), c)[0], -(inverse @ v.flat()).square().sum())


def test_a_pseudo_inverse_of_few_rows_and_the_identity():
    x = matrix("mlp", "low-rank")
    m, v = x + nng.PMatEye.build(x.layer_collection, 2.0, dtype=f64), vectors(x, 2)
    dense = x.to_dense() + 2 * torch.eye(x.shape[0], dtype=f64)
    close(m.solve(v, nng.Cutoff(1.0)).flat(), torch.linalg.solve(dense, v.flat().T).T)
    large = float(torch.linalg.eigvalsh(dense)[-1])
    cut = nng.Cutoff((2 + large) / 2)
    expected = torch.linalg.pinv(dense, atol=cut.value, rtol=0.0, hermitian=True)
    close(m.solve(v, cut).flat(), v.flat() @ expected)


def test_multiples_of_kronecker_products_keep_their_sign():
    for kind in ("kfac", "ekfac"):
        m = -2 * matrix("mlp", kind)
        close(m.eigh()[0], torch.linalg.eigvalsh(m.to_dense()))
        with pytest.raises(nng.SingularError):
            m.solve(vectors(m), 1e-3)
        assert float(m.logdet(1e-3)) == -torch.inf


@pytest.mark.parametrize("pair", [("kfac", "diag"), ("kfac", "kfac"), ("quasi-diag", "kfac"), ("low-rank", "diag")])
def test_inverses_of_sums_are_matrices_with_the_algebra_of_stored_ones(pair):
    total = matrix("mlp", pair[0]) + matrix("mlp", pair[1], 1)
    m = total.inverse(damping_of(total.to_dense()))
    dense, v = m.to_dense(), vectors(m, 2)
    values, u = torch.linalg.eigh(dense)
    close((m**0.5).to_dense(), (u * values.sqrt()) @ u.T)
    close(m.apply(torch.log1p).to_dense(), (u * values.log1p()) @ u.T)
    close(m.norm(2), values.max())
    shift = 0.5 * float(values[0] + values[-1])
    indefinite = m.solve(v, indefinite=True).flat()
    close(indefinite, torch.linalg.solve(dense, v.flat().T).T)
    flipped = (-1.0 * m).solve(v, shift, indefinite=True).flat()
    close(flipped, torch.linalg.solve(shift * torch.eye(len(dense), dtype=f64) - dense, v.flat().T).T)
