"""The contract of function-space matrices: every representation on every model of the zoo, one property a test."""

import functools
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cases import CASES, FUNCTION_SPACE, STORED_KERNELS, Case, build
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import nngeom as nng
from nngeom.core import costs, pairs
from nngeom.core.factored import FactoredJacobian
from nngeom.core.tile import Tile
from nngeom.fmat.store import FileStore


def expected(kind, kernel):
    """The dense matrix that a representation of a kernel stands for."""
    c, n, _, m = kernel.shape
    if kind == "block-diag":
        kernel = kernel * torch.eye(c, dtype=kernel.dtype)[:, None, :, None]
    if kind == "diag":
        return torch.diag(kernel.reshape(c * n, c * m).diagonal())
    return kernel.reshape(c * n, c * m)


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def centre(j, mean):
    return j - mean.mean(1, keepdim=True)


@dataclass(frozen=True)
class Measured:
    """A kernel, the dense matrix it stands for, and a batch of vectors."""

    kind: str
    case: Case
    kernel: torch.Tensor
    k: Any

    @functools.cached_property
    def m(self):
        """What its entries are."""
        return expected(self.kind, self.kernel)

    @functools.cached_property
    def damping(self):
        """A third of the mean eigenvalue."""
        return 0.3 * float(self.m.trace()) / len(self.m)

    @property
    def damped(self):
        """The entries with the damping added."""
        return self.m + self.damping * torch.eye(len(self.m), dtype=self.m.dtype)

    def vectors(self):
        """Two, and the same flat."""
        f = torch.randn(2, 3, self.case.n, dtype=torch.float64)
        return nng.FVector(f), f.flatten(1)


@functools.cache
def truth(name):
    """A model of the zoo and its exact kernel ``(c, n, c, n)``."""
    torch.set_num_threads(1)
    case = build(name)
    j = reference.jacobian(case.model, case.inputs)
    return case, torch.einsum("knd,lmd->knlm", j, j)


@pytest.fixture(params=CASES, scope="module")
def exact(request):
    return truth(request.param)


@pytest.fixture(params=FUNCTION_SPACE, scope="module")
def measured(request, exact):
    case, kernel = exact
    k = nng.GramMatrix(case.model, case.loader, FUNCTION_SPACE[request.param])
    return Measured(request.param, case, kernel, k)


def only(*kinds):
    """Of these representations alone; each is measured once for all tests."""
    return pytest.mark.parametrize("measured", kinds, indirect=True, scope="module")


def test_entries_are_exact(measured):
    dense = measured.k.to_dense()
    close(dense, measured.m)
    assert measured.k.shape == tuple(measured.m.shape) and measured.k.dtype == dense.dtype == torch.float64


def test_products_and_forms(measured):
    k, (f, flat) = measured.k, measured.vectors()
    close(k.mv(f).tensor.flatten(1), flat @ measured.m)
    close((k @ f).tensor, k.mv(f).tensor)
    close(k.T.mv(f).tensor, k.mv(f).tensor)
    close(k.vTMv(f), ((flat @ measured.m) * flat).sum(1))


def test_trace_diagonal_and_norm(measured):
    close(measured.k.trace(), measured.m.trace())
    close(measured.k.diag().tensor.flatten(), measured.m.diagonal())
    close(measured.k.norm(), measured.m.norm())
    close(measured.k.norm(2), torch.linalg.matrix_norm(measured.m, 2), 1e-9)


def test_solves(measured):
    f, flat = measured.vectors()
    solved = measured.k.solve(f, measured.damping).tensor.flatten(1)
    close(solved, torch.linalg.solve(measured.damped, flat.T).T, 1e-5 if measured.kind == "implicit" else 1e-8)


def test_multiples(measured):
    f, flat = measured.vectors()
    close((2 * measured.k - measured.k / 2).mv(f).tensor.flatten(1), 1.5 * (flat @ measured.m))


def test_as_an_operator_of_scipy(measured):
    _, flat = measured.vectors()
    close(torch.as_tensor(measured.k.to_scipy() @ flat[0].numpy()), measured.m @ flat[0])


@only("implicit")
def test_materialized(measured):
    close(measured.k.materialize().tensor, measured.kernel)


@only("implicit")
def test_leading_eigenpairs_from_products(measured):
    top, vectors = measured.k.lanczos(2, generator=torch.Generator().manual_seed(0))
    close(top, torch.linalg.eigvalsh(measured.m).flip(0)[:2], 1e-6)
    close(measured.k.mv(nng.FVector(vectors.tensor[:1])).tensor, top[0] * vectors.tensor[:1], 1e-4)


@only("implicit")
def test_what_products_cannot_give_is_refused(measured):
    for refused in (measured.k.eigh, measured.k.logdet, lambda: pickle.dumps(measured.k)):
        with pytest.raises(nng.UnsupportedError):
            refused()


@only(*STORED_KERNELS)
def test_eigenvalues_and_eigenvectors(measured):
    values, u = measured.k.eigh()
    assert bool((values.diff() >= 0).all())
    close(u @ values.diag() @ u.T, measured.m)
    close(u.T @ u, torch.eye(len(u), dtype=u.dtype))
    close(measured.k.eigvalsh(), torch.linalg.eigvalsh(measured.m), 1e-8)


@only(*STORED_KERNELS)
def test_log_determinant(measured):
    close(measured.k.logdet(measured.damping), torch.logdet(measured.damped))


@only(*STORED_KERNELS)
def test_pickled_and_back(measured):
    copy = pickle.loads(pickle.dumps(measured.k))
    assert type(copy) is type(measured.k) and torch.equal(copy.tensor, measured.k.tensor)


@only(*STORED_KERNELS)
def test_to_another_dtype(measured):
    assert measured.k.to(torch.float32).mv(measured.vectors()[0]).dtype == torch.float32


SOME = [
    "mlp",
    "conv2d",
    "transformer",
    "language-model",
    "gru",
    "tied",
    "bare",
    "shared-table",
    "depthwise",
    "deconv1d",
]


@pytest.mark.parametrize("kind", STORED_KERNELS)
@pytest.mark.parametrize("name", SOME)
def test_centred_rectangular_layers_and_tiles(name, kind):
    """Centring, two loaders, per layer, and any budget or batches: the same numbers as dense features give."""
    case = build(name)
    rep, j = STORED_KERNELS[kind], reference.jacobian(case.model, case.inputs)
    case.__dict__["kernel"] = torch.einsum("knd,lmd->knlm", j, j)
    other = case.loader[1:]
    r = j[:, len(case.loader[0][0]) :]
    jc, rc = centre(j, j), centre(r, j)
    product = lambda x, y: torch.einsum("knd,lmd->knlm", x, y)
    whole, small = [(case.inputs, case.targets)], [(x[None], y[None]) for x, y in zip(case.inputs, case.targets)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nng.MemoryWarning)
        for loader, options in (
            (case.loader, {}),
            (case.loader, {"memory_budget": 2000}),
            (whole, {}),
            (small, {"memory_budget": 20_000}),
        ):
            close(nng.GramMatrix(case.model, loader, rep, **options).to_dense(), expected(kind, case.kernel), 1e-10)
            close(
                nng.GramMatrix(case.model, loader, rep, centered=True, **options).to_dense(),
                expected(kind, product(jc, jc)),
            )
            layers = nng.GramMatrices(case.model, loader, rep, **options)
            lc = nng.LayerCollection.from_model(case.model)
            assert list(layers) == list(lc.by_layer())
            offsets = lc.offsets()
            for layer, names in lc.by_layer().items():
                index = torch.cat(
                    [torch.arange(offsets[n][0], offsets[n][0] + torch.Size(offsets[n][1]).numel()) for n in names]
                )
                truth = expected(kind, product(j[..., index], j[..., index]))
                torch.testing.assert_close(
                    layers[layer].to_dense(), truth, rtol=1e-9, atol=1e-9 * float(case.kernel.abs().max())
                )
            if kind != "diag":
                for x, y, centered in ((j, r, False), (jc, rc, True)):
                    k = nng.GramMatrix(case.model, loader, rep, other=other, centered=centered, **options)
                    close(k.to_dense(), expected(kind, product(x, y)))
                f = nng.FVector(torch.randn(3, k.rows, dtype=torch.float64))
                close(k.T.mv(f).tensor.flatten(), expected(kind, product(jc, rc)).T @ f.tensor.flatten())


def test_implicit_centred_and_rectangular():
    c = build("conv2d")
    j = reference.jacobian(c.model, c.inputs)
    r = j[:, 3:]
    for centered in (False, True):
        x, y = (centre(j, j), centre(r, j)) if centered else (j, r)
        k = nng.GramMatrix(c.model, c.loader, nng.FMatImplicit, other=c.loader[1:], centered=centered)
        m = expected("implicit", torch.einsum("knd,lmd->knlm", x, y))
        close(k.to_dense(), m)
        close(k.T.to_dense(), m.T)
        close(k.T.materialize().to_dense(), m.T)
        close((2 * k).materialize().to_dense(), 2 * m)
        s = nng.GramMatrix(c.model, c.loader, nng.FMatImplicit, centered=centered)
        truth = expected("implicit", torch.einsum("knd,lmd->knlm", x, x))
        close(s.to_dense(), truth)
        close(s.trace(), truth.trace())
        estimate = s.trace("hutchinson", 200, torch.Generator().manual_seed(0))
        assert abs(float(estimate) - float(truth.trace())) < 4 * float(estimate.standard_error)
    lazy = s + nng.GramMatrix(c.model, c.loader, nng.FMatDiag)
    close(lazy.to_dense(), truth + expected("diag", torch.einsum("knd,lmd->knlm", j, j)))


def test_subset_of_parameters_and_function():
    c = build("mlp")
    lc = nng.LayerCollection.from_model(c.model, include="2.*")
    j = reference.jacobian(c.model, c.inputs)
    tail = j[..., -lc.numel :]
    close(nng.GramMatrix(c.model, c.loader, layer_collection=lc).tensor, torch.einsum("knd,lmd->knlm", tail, tail))
    margin = lambda x, y: c.model(x)[:, 0] - c.model(x)[:, 1]
    d = (j[0] - j[1])[None]
    close(nng.GramMatrix(c.model, c.loader, function=margin).tensor, torch.einsum("knd,lmd->knlm", d, d))


def test_spectrum_is_that_of_the_gaussian_fisher():
    """The non-zero spectrum of K is that of n F; trace and Frobenius norm too."""
    c = build("conv1d")
    k = nng.GramMatrix(c.model, c.loader)
    f = nng.FIM(c.model, c.loader, nng.PMatDense, likelihood="gaussian")
    close(k.trace() / c.n, f.trace(), 1e-10)
    close(k.norm() / c.n, f.norm(), 1e-10)
    rank = min(k.shape[0], f.shape[0])
    close(k.eigvalsh()[-rank:] / c.n, torch.linalg.eigvalsh(f.to_dense())[-rank:], 1e-9)


def test_primal_and_dual_ridge_agree():
    """(J^T J + x)^-1 J^T y = J^T (J J^T + x)^-1 y."""
    c = build("mlp")
    j = nng.Jacobian(c.model, c.loader)
    y = nng.FVector(torch.randn(3, c.n, dtype=torch.float64))
    primal = (j.T @ j).materialize().solve(j.T @ y, 0.1)
    dual = j.T @ nng.GramMatrix(c.model, c.loader).solve(y, 0.1)
    close(primal.flat(), dual.flat())


@pytest.mark.parametrize(
    "name", ["mlp", "conv2d", "transformer", "language-model", "layer-norm", "rms-norm", "bare", "depthwise", "gru"]
)
def test_differentiable(name):
    """Gradients of traces and of a random function of the kernel against double backward by torch alone, and finite
    differences.
    """
    c = build(name)
    params = reference.parameters(c.model)
    weight = torch.randn(3, c.n, 3, c.n, dtype=torch.float64)

    def truth():
        rows = []
        for x in c.inputs:
            out = c.model(x[None])[0]
            grads = [torch.autograd.grad(f, params, create_graph=True, allow_unused=True) for f in out]
            rows.append(
                torch.stack(
                    [
                        torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gs, params)])
                        for gs in grads
                    ]
                )
            )
        j = torch.stack(rows, 1)
        return torch.einsum("knd,lmd->knlm", j, j)

    def gradient(value):
        grads = torch.autograd.grad(value, params, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, params)])

    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative on a CPU
        k = truth()
    whole = gradient((weight * k).sum())
    with sdpa_kernel(SDPBackend.MATH):
        k = truth()
    trace = gradient(torch.einsum("knkn->", k))
    dense = nng.GramMatrix(c.model, c.loader, differentiable=True)
    close(gradient((weight * dense.tensor).sum()), whole)
    close(gradient(nng.GramMatrix(c.model, c.loader, nng.FMatDiag, differentiable=True).trace()), trace)
    close(gradient(nng.GramMatrix(c.model, c.loader, nng.FMatBlockDiag, differentiable=True).trace()), trace)
    p, step = params[0], 1e-6
    value = []
    for sign in (1, -1):
        p.data.view(-1)[0] += sign * step
        value.append(float(nng.GramMatrix(c.model, c.loader, nng.FMatDiag).trace()))
        p.data.view(-1)[0] -= sign * step
    close(torch.tensor((value[0] - value[1]) / (2 * step), dtype=torch.float64), trace[0], 1e-4)


def test_differentiable_keeps_no_memory():
    """Fifty penalised steps leave no tensor behind."""
    import gc

    c = build("conv2d")
    count = []
    for step in range(51):
        nng.GramMatrix(c.model, c.loader[0], nng.FMatDiag, differentiable=True).trace().backward()
        nng.GramMatrix(c.model, c.loader[0], differentiable=True).tensor.sum().backward()
        if step in (1, 50):
            gc.collect()
            count.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert count[0] == count[1]


def test_random_signs_are_unbiased():
    c = build("mlp")
    exact = nng.GramMatrix(c.model, c.loader)
    generator = torch.Generator().manual_seed(0)
    t = nng.GramMatrix(
        c.model, c.loader, nng.FMatDiag, estimator="rademacher", samples=400, generator=generator
    ).trace()
    assert 0 < float(t.standard_error) < 0.1 * float(exact.trace())
    assert abs(float(t) - float(exact.trace())) < 4 * float(t.standard_error)
    k = nng.GramMatrix(c.model, c.loader, other=c.loader[1:], estimator="rademacher", samples=1000, generator=generator)
    truth = torch.einsum("knkm->nm", exact.tensor)[:, 3:]
    z = (k.kernel.tensor[0, :, 0] - truth) / k.standard_error
    assert float(z.abs().max()) < 4.5 and float((k.standard_error / truth.abs().max()).max()) < 0.1
    single = nng.GramMatrix(c.model, c.loader, nng.FMatDiag, estimator="rademacher", differentiable=True).trace()
    single.value.backward()
    assert c.model[0].weight.grad is not None and float(single.standard_error) == float("inf")
    with pytest.raises(nng.UnsupportedError, match="trace"):
        nng.GramMatrix(c.model, c.loader, nng.FMatDiag, estimator="rademacher").solve(None)


def test_estimate_does_not_depend_on_batches():
    c = build("mlp")
    one = [
        nng.GramMatrix(
            c.model, data, nng.FMatDiag, estimator="rademacher", samples=3, generator=torch.Generator().manual_seed(1)
        ).samples
        for data in (c.loader, [(c.inputs, c.targets)])
    ]
    close(one[0], one[1])


class Stopped(RuntimeError):
    pass


@pytest.mark.filterwarnings("ignore::nngeom.MemoryWarning")
@pytest.mark.parametrize("centered", [False, True])
def test_interrupted_file_resumes_to_the_same_bytes(tmp_path, monkeypatch, centered):
    c = build("conv1d", sizes=(2, 2, 3))
    options = {"memory_budget": 6000, "centered": centered}
    truth = nng.GramMatrix(c.model, c.loader, **options)
    whole = nng.GramMatrix(c.model, c.loader, out=tmp_path / "whole.npy", **options)
    close(whole.tensor, truth.tensor, 1e-10)
    write, calls = FileStore.write, []

    def stops(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        write(self, *args)

    monkeypatch.setattr(FileStore, "write", stops)
    with pytest.raises(Stopped):
        nng.GramMatrix(c.model, c.loader, out=tmp_path / "k.npy", **options)
    first = len(calls)
    changed = [(c.loader[0][0] + 1e-9, c.loader[0][1]), *c.loader[1:]]
    with pytest.raises(nng.ArgumentError, match="other inputs"):
        nng.GramMatrix(c.model, changed, out=tmp_path / "k.npy", **options)
    with pytest.raises(nng.ArgumentError, match="other inputs"):
        nng.GramMatrix(c.model, c.loader, out=tmp_path / "k.npy", function=lambda x, y: 2 * c.model(x), **options)
    k = nng.GramMatrix(c.model, c.loader, out=tmp_path / "k.npy", **options)
    assert len(calls) > first and (tmp_path / "k.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not list(tmp_path.glob("*.tiles*"))
    np.testing.assert_array_equal(np.load(tmp_path / "k.npy"), k.tensor.numpy())


def test_file_errors(tmp_path):
    c = build("mlp")
    with pytest.raises(nng.FileError, match="cannot write"):
        nng.GramMatrix(c.model, c.loader, out=tmp_path / "nowhere" / "k.npy")
    with pytest.raises(nng.ArgumentError, match="FMatDense"):
        nng.GramMatrix(c.model, c.loader, nng.FMatDiag, out=tmp_path / "k.npy")


def test_errors():
    c = build("mlp")
    k = nng.GramMatrix(c.model, c.loader)
    with pytest.raises(nng.ArgumentError, match="other="):
        nng.GramMatrix(c.model, c.loader, nng.FMatDiag, other=c.loader)
    with pytest.raises(nng.ArgumentTypeError, match="FMatDense"):
        nng.GramMatrix(c.model, c.loader, nng.PMatDense)
    with pytest.raises(nng.ArgumentTypeError, match="FVector"):
        k.mv(torch.zeros(3, c.n))
    with pytest.raises(nng.ArgumentError, match="expected"):
        k.mv(nng.FVector(torch.zeros(3, c.n + 1)))
    with pytest.raises(nng.SingularError):
        (k - 2 * k).solve(nng.FVector(torch.zeros(3, c.n, dtype=torch.float64)), 0.0)
    with pytest.raises(nng.DampingError):
        k.solve(nng.FVector(torch.zeros(3, c.n, dtype=torch.float64)), -1.0)
    with pytest.raises(nng.ArgumentError, match="square"):
        nng.GramMatrix(c.model, c.loader, other=c.loader[1:]).trace()
    with pytest.raises(nng.SizeError, match="limit"):
        k.to_dense(limit=3)
    with pytest.raises(nng.ArgumentError, match="rademacher"):
        nng.GramMatrix(c.model, c.loader, nng.FMatDiag, estimator="gaussian")
    rank_one = nng.FMatDense(torch.ones(1, 3, 1, 3, dtype=torch.float64))
    assert float(rank_one.logdet()) == -float("inf")
    close(
        rank_one.solve(nng.FVector(torch.ones(1, 3, dtype=torch.float64)), nng.Cutoff(1e-6)).tensor,
        torch.full((1, 3), 1 / 3, dtype=torch.float64),
    )


class Ragged(nn.Module):
    """Sequences of another length in every batch, through an embedding and a recurrent cell."""

    def __init__(self):
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(7, 3), nn.GRU(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cell(self.embed(x))[0][:, -1])


def test_batches_of_other_lengths():
    torch.manual_seed(3)
    model = Ragged().double()
    loader = [(torch.randint(0, 7, (n, t)),) for n, t in ((2, 3), (1, 5), (3, 3))]
    j = torch.cat([reference.jacobian(model, x) for (x,) in loader], 1)
    truth = torch.einsum("knd,lmd->knlm", j, j)
    close(nng.GramMatrix(model, loader).tensor, truth)
    case = Case(model, [(x, torch.zeros(len(x))) for (x,) in loader])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nng.MemoryWarning)
        close(nng.GramMatrix(case.model, loader, memory_budget=4000).tensor, truth)


class Moody(nn.Module):
    """A weight that is used plainly on short inputs and through an unusual operation on long ones."""

    def __init__(self):
        super().__init__()
        self.map, self.head = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x):
        w = self.map.weight if x.shape[1] < 4 else torch.exp(self.map.weight)
        return self.head(torch.tanh(nn.functional.linear(x, w, self.map.bias)).sum(1))


def test_batches_that_use_a_parameter_differently():
    """Chunks of different structure are paired parameter by parameter, for kernels, layers and centring alike."""
    torch.manual_seed(4)
    model = Moody().double()
    loader = [(torch.randn(n, t, 2, dtype=torch.float64),) for n, t in ((2, 3), (3, 5), (2, 3))]
    j = torch.cat([reference.jacobian(model, x) for (x,) in loader], 1)
    jc = centre(j, j)
    product = lambda x, y: torch.einsum("knd,lmd->knlm", x, y)
    close(nng.GramMatrix(model, loader).tensor, product(j, j))
    close(nng.GramMatrix(model, loader, centered=True).tensor, product(jc, jc))
    close(nng.GramMatrix(model, loader, other=loader[:1], centered=True).tensor, product(jc, jc[:, :2]))
    layers = nng.GramMatrices(model, loader)
    close(sum(layers.values()).tensor, product(j, j))
    close(layers["map"].tensor, product(j[..., :9], j[..., :9]))


def test_many_examples_and_pooled_positions():
    """More examples than blocks of the symmetric half, groups, pairs of positions, and positions with equal
    gradients.
    """
    torch.manual_seed(5)
    body = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 16, 2), nn.ReLU(), nn.Flatten(2)
    ).double()
    head = nn.Linear(16, 3).double()
    model = nn.ModuleList([body, head])
    function = lambda x: head(body(x).transpose(1, 2)).mean(1)
    x = torch.randn(19, 4, 3, 3, dtype=torch.float64)
    params = [p for p in model.parameters()]
    rows = [
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(f, params, retain_graph=True)])
            for f in function(one[None])[0]
        ]
        for one in x
    ]
    j = torch.stack([torch.stack(r) for r in rows], 1)
    truth = torch.einsum("knd,lmd->knlm", j, j)
    for data in ([(x,)], list(zip(x.split(4)))):
        close(nng.GramMatrix(model, data, function=function).tensor, truth)
    close(nng.GramMatrix(model, [(x[:12],)], function=function, other=[(x[7:],)]).tensor, truth[:, :12, :, 7:])
    close(nng.GramMatrix(model, [(x,)], nng.FMatDiag, function=function).tensor, torch.einsum("knkn->kn", truth))


@pytest.mark.parametrize("sizes", [(40,), (8,) * 5])
def test_tiles_of_a_file_keep_to_the_budget(tmp_path, monkeypatch, sizes):
    """Of one batch and of several that would be held together: no tile is larger than its share of the budget."""
    case, largest = build("mlp", sizes=sizes), []
    expected = nng.GramMatrix(case.model, case.loader).tensor
    result = Tile.result

    def watched(self):
        largest.append(self.flat.numel() * self.flat.element_size())
        return result(self)

    monkeypatch.setattr(Tile, "result", watched)
    k = nng.GramMatrix(case.model, case.loader, out=tmp_path / "k.npy", memory_budget=2**16)
    close(torch.as_tensor(k.tensor), expected, 1e-10)
    assert len(largest) > 1 and max(largest) <= 2**14 < expected.numel() * 8


@pytest.mark.parametrize("way", [pairs.by_rows, pairs.by_positions])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("by_examples", [True, False])
@pytest.mark.parametrize("slice_bytes", [2**10, 2**22])
def test_orders_and_slices_of_a_tile(monkeypatch, way, symmetric, by_examples, slice_bytes):
    """However a tile lies in memory and is cut, the products are those of the rows."""
    monkeypatch.setattr(costs, "SLICE_BYTES", slice_bytes)
    torch.manual_seed(0)
    draw = lambda k, n, t: FactoredJacobian(torch.randn(n, t, 2, 5).double(), torch.randn(k, n, t, 2, 3).double())
    x = draw(4, 7, 3)
    y = x if symmetric else draw(2, 6, 3)
    tile = Tile(x, y, by_examples=by_examples)
    way(tile, x, y)
    left, right = (z.matrix().flatten(2) for z in (x, y))
    close(tile.result(), torch.einsum("knp,lmp->knlm", left, right))
