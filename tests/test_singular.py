"""One rule for what is singular: without damping, a log-determinant is -inf exactly where a solve raises."""

import math

import pytest
import torch
from cases import STORED, STORED_KERNELS, representation
from torch import nn

import nngeom as nng

BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])


class Dead(nn.Module):
    """Fewer rows than parameters, units that are never active, inputs that are copies of each other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def dead(dtype, n=5):
    torch.manual_seed(0)
    model = Dead()
    with torch.no_grad():
        model.a.bias[:2] = -100.0
        model.a.bias[2] = 1e-30
    x = torch.randn(n, 4)
    x[:, 1] = x[:, 0]
    return model.to(dtype), [(x.to(dtype), torch.arange(n) % 3)]


def full(dtype, n=60):
    """Every representation is regular here: more rows than parameters, and likelihoods without an unseen direction."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    return model.to(dtype), [(torch.randn(n, 3, dtype=dtype), torch.randn(n, 2, dtype=dtype))]


def fim(kind):
    return lambda model, data: nng.FIM(model, data, kind, likelihood="gaussian")


def stored(name):
    return lambda model, data: fim(representation(name, model))(model, data)


MATRICES = {name: stored(name) for name in STORED if name != "eye"}  # a multiple of the identity: a test of its own
MATRICES |= {
    "scaled": lambda model, data: 1e6 * fim(nng.PMatEKFAC)(model, data),
    "sum": lambda model, data: fim(nng.PMatDense)(model, data) + fim(nng.PMatLowRank)(model, data),
    "closed sum": lambda model, data: 0.3 * fim(nng.PMatDense)(model, data) + fim(nng.PMatDense)(model, data),
    "product": lambda model, data: fim(nng.PMatDense)(model, data) @ fim(nng.PMatDiag)(model, data),
    "ggn": lambda model, data: nng.GGN(model, data, nng.PMatEKFAC, loss=lambda f, y: f.square().sum(1)),
}


@BOTH
@pytest.mark.parametrize("name", MATRICES)
def test_singular_matrices(name, dtype):
    m = MATRICES[name](*dead(dtype))
    for factor in (1.0, 1e-12, 1e12):
        scaled = factor * m
        assert float(scaled.logdet(0.0)) == -math.inf
        with pytest.raises(nng.SingularError):
            scaled.solve(nng.PVector.randn(m.layer_collection, dtype=dtype), 0.0)
    x = torch.tensor(0.5, dtype=dtype)
    expected = torch.linalg.slogdet(m.to_dense().double() + 0.5 * torch.eye(m.shape[0], dtype=torch.float64))[1]
    torch.testing.assert_close(m.logdet(x).double(), expected, rtol=1e-5, atol=1e-4 if dtype is torch.float32 else 1e-9)


@BOTH
@pytest.mark.parametrize("name", MATRICES)
def test_regular_matrices(name, dtype):
    m = MATRICES[name](*full(dtype))
    expected = torch.linalg.slogdet(m.to_dense().double())[1]
    torch.testing.assert_close(m.logdet(0.0).double(), expected, rtol=1e-3 if dtype is torch.float32 else 1e-8, atol=0)
    v = nng.PVector.randn(m.layer_collection, dtype=dtype)
    back = m.mv(m.solve(v, 0.0)).flat()
    torch.testing.assert_close(back, v.flat(), rtol=0, atol=1e-2 if dtype is torch.float32 else 1e-7)


@BOTH
def test_multiples_of_the_identity(dtype):
    lc = nng.LayerCollection.from_model(Dead())
    zero, one = (nng.PMatEye.build(lc, c, dtype=dtype) for c in (0.0, 1e-20))
    assert float(zero.logdet()) == -math.inf
    torch.testing.assert_close(one.logdet(), torch.tensor(lc.numel * math.log(1e-20), dtype=dtype))
    v = nng.PVector.randn(lc, dtype=dtype)
    torch.testing.assert_close(one.solve(v).flat(), 1e20 * v.flat())
    with pytest.raises(nng.SingularError):
        zero.solve(nng.PVector.randn(lc, dtype=dtype))


def test_indefinite_matrices():
    model, data = full(torch.float64)
    a, b = (fim(kind)(model, data) for kind in (nng.PMatDense, nng.PMatDiag))
    for m in (a - 100 * a, a - 3 * b, -1.0 * fim(nng.PMatKFAC)(model, data), -1.0 * fim(nng.PMatLowRank)(model, data)):
        assert float(m.logdet()) == -math.inf
        with pytest.raises(nng.SingularError):
            m.solve(nng.PVector.randn(m.layer_collection, dtype=torch.float64))


def test_the_error_is_of_the_block_that_needs_most():
    model, _ = full(torch.float64)
    lc = nng.LayerCollection.from_model(model)
    sizes = {
        layer: sum(torch.Size(lc.shapes[lc.names.index(n)]).numel() for n in names)
        for layer, names in lc.by_layer().items()
    }
    eyes = {layer: torch.eye(p, dtype=torch.float64) for layer, p in sizes.items()}
    first, second, *_ = eyes
    for indefinite, singular in ((first, second), (second, first)):
        m = nng.PMatBlockDiag.from_blocks(
            lc, {**eyes, singular: 0 * eyes[singular], indefinite: -0.3 * eyes[indefinite]}
        )
        for use in (lambda m: m.inverse(0.0), lambda m: m.solve(nng.PVector.randn(lc, dtype=torch.float64))):
            with pytest.raises(nng.SingularError, match=r"3\.0+e-01"):
                use(m)


@BOTH
def test_a_matrix_and_its_inverse(dtype):
    model, data = full(dtype)
    for name in STORED:
        m = stored(name)(model, data)
        torch.testing.assert_close(m.inverse(0.1).logdet(), -m.logdet(0.1), rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("kind", STORED_KERNELS.values())
def test_kernels(kind, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    x = torch.randn(6, 4, dtype=dtype)
    k = nng.GramMatrix(model, [(x,)], kind)
    f = nng.FVector(torch.randn(2, 6, dtype=dtype))
    assert math.isfinite(float(k.logdet()))
    k.solve(f)
    tensor = k.tensor.clone()  # an example twice; for a diagonal, one without any gradient to speak of
    if kind is nng.FMatDiag:
        tensor[:, 1] = tensor.max() * torch.finfo(dtype).eps / 4
    else:
        tensor.select(1, 1).copy_(tensor.select(1, 0))
        tensor.select(-1, 1).copy_(tensor.select(-1, 0))
    for factor in (1.0, 1e-12, 1e12):
        singular = factor * kind(tensor)
        assert float(singular.logdet()) == -math.inf
        assert float((singular + 0 * singular).logdet()) == -math.inf
        with pytest.raises(nng.SingularError):
            singular.solve(f)
    expected = torch.logdet(kind(tensor).to_dense().double() + 0.5 * torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(kind(tensor).logdet(0.5).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_kernel_with_a_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    k = nng.GramMatrix(model, [(x,)], differentiable=True)
    grads = torch.autograd.grad(k.logdet(0.1), list(model.parameters()), retain_graph=True, allow_unused=True)
    dense = k.to_dense() + 0.1 * torch.eye(8, dtype=torch.float64)
    for a, b in zip(grads, torch.autograd.grad(torch.logdet(dense), list(model.parameters()), allow_unused=True)):
        assert (a is None and b is None) or torch.allclose(a, b)
    twice = nng.GramMatrix(model, [(torch.cat([x, x]),)], differentiable=True)
    assert float(twice.logdet().detach()) == -math.inf


@BOTH
def test_damping_below_rounding(dtype):
    """Eigenvalues that are zero count as zero, whatever is added to them: the damping alone is left of them."""
    model, data = dead(dtype)
    x = 1e-14 if dtype is torch.float64 else 1e-9
    for kind in (nng.PMatLowRank, nng.PMatDense):
        m = fim(kind)(model, data)
        rank = int((torch.linalg.eigvalsh(m.to_dense().double()) > 1e-6).sum())
        values = torch.linalg.eigvalsh(m.to_dense().double())[-rank:]
        expected = values.log().sum() + (m.shape[0] - rank) * math.log(x)
        torch.testing.assert_close(m.logdet(x).double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", [nng.FMatDense, nng.FMatBlockDiag, nng.FMatImplicit])
def test_kernels_between_two_sets_are_not_solved_with(kind):
    """Half of the entries would be read, those below the diagonal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(2, 5, 4, dtype=torch.float64)
    k = nng.GramMatrix(model, [x], kind, other=[y])
    f = nng.FVector(torch.randn(2, 5, dtype=torch.float64))
    operations = [lambda: k.solve(f, 1.0)]
    operations += [lambda: k.lanczos(1)] if kind is nng.FMatImplicit else [k.eigh, k.eigvalsh, lambda: k.logdet(1.0)]
    for operation in operations:
        with pytest.raises(nng.ArgumentError, match="symmetric"):
            operation()
    torch.testing.assert_close(k.vTMv(f), f.flat() @ k.to_dense() @ f.flat())


@pytest.mark.parametrize("name", [name for name in MATRICES if name != "product"])
def test_gradients_where_eigenvalues_repeat(name):
    """What is made of an inverse that has a graph: the right gradient, or an error; never NaN."""
    m = MATRICES[name](*dead(torch.float64))
    dense = m.to_dense()
    d = len(dense)
    eye, v = torch.eye(d, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    size = 1e6 if name == "scaled" else 1.0
    lowest = max(0.0, -float(torch.linalg.eigvalsh(dense / size).min()))
    x = torch.tensor(size * (0.3 + 2 * lowest), dtype=torch.float64, requires_grad=True)
    w, y = nng.PVector(m.layer_collection, v), 0.1 / size

    def same(mine, theirs):
        torch.testing.assert_close(mine, theirs)
        slopes = (torch.autograd.grad(t.square().sum(), x)[0] for t in (mine, theirs))
        torch.testing.assert_close(*slopes)

    inverse = lambda x: torch.linalg.inv(dense + x * eye)
    same(m.inverse(x).solve(w, y).flat(), torch.linalg.solve(inverse(x) + y * eye, v))
    same(m.inverse(x).inverse(y).mv(w).flat(), torch.linalg.solve(inverse(x) + y * eye, v))
    both = m.inverse(x) + m.inverse(2 * x)
    same(both.solve(w, y).flat(), torch.linalg.solve(inverse(x) + inverse(2 * x) + y * eye, v))
    same(m.inverse(x).logdet(y), torch.logdet(inverse(x) + y * eye))
    same(m.inverse(x).norm() * size, inverse(x).norm() * size)
    for mine in (
        lambda: m.inverse(x).solve(w, nng.Cutoff(1e-9 / size)).flat(),
        lambda: m.inverse(x).inverse(nng.Cutoff(1e-9 / size)).mv(w).flat(),
        lambda: m.inverse(nng.FactoredTikhonov(x)).inverse(y).mv(w).flat(),
        lambda: m.inverse(x).sample(1, y, generator=torch.Generator().manual_seed(0)).flat(),
    ):
        try:
            slope = torch.autograd.grad(mine().sum(), x)[0]
        except NotImplementedError:
            continue
        assert bool(torch.isfinite(slope))


@pytest.mark.parametrize("kind", [nng.PMatKFAC, nng.PMatEKFAC])
def test_minus_a_matrix_of_kronecker_products_keeps_its_spectrum(kind):
    model, data = full(torch.float64)
    m = fim(kind)(model, data)
    torch.testing.assert_close((-1.0 * m).eigh()[0], -m.eigh()[0].flip(0))
    v, shift = nng.PVector.randn(m.layer_collection, dtype=torch.float64), 2 * float(m.eigh()[0][-1])
    expected = torch.linalg.solve(shift * torch.eye(m.shape[0], dtype=torch.float64) - m.to_dense(), v.flat())
    torch.testing.assert_close((-1.0 * m).solve(v, shift).flat(), expected)
