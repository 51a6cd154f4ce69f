"""Implicit matrices: many products at once, layer by layer, and the ends of their spectra."""

import pytest
import reference
import torch
from cases import CASES, build
from torch import nn

import nngeom as nng
from nngeom.core import memory

f64 = torch.float64
MEASURES = ("FIM", "FIM_MonteCarlo", "EmpiricalFIM", "GGN", "Hessian", "GradientCovariance")


def measured(name, case, model=None, representation=nng.PMatImplicit, **options):
    """A measure of a case, on labelled batches."""
    if name not in ("FIM", "FIM_MonteCarlo"):
        options["loss"] = "cross_entropy"
    if name == "FIM_MonteCarlo":
        options["generator"] = torch.Generator().manual_seed(3)
    return getattr(nng, name)(model or case.model, case.loader, representation, **options)


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer", "lstm", "tied", "embedding"])
def test_many_vectors_are_what_one_is(name, measure):
    case = build(name)
    m = measured(measure, case)
    v = nng.PVector.randn(m.layer_collection, 5, dtype=f64)
    v.flat()[2] = 0
    singly = torch.stack([m.mv(nng.PVector(m.layer_collection, row)).flat() for row in v.flat()])
    close(m.mv(v).flat(), singly)
    if measure != "Hessian" and measure != "FIM_MonteCarlo":
        dense = measured(measure, case, representation=nng.PMatDense).to_dense()
        close(m.to_dense(), dense)
    with memory.limit(1):
        close(m.mv(v).flat(), singly)


@pytest.mark.parametrize("name", CASES)
def test_kernels_times_many_vectors(name):
    case = build(name)
    k = nng.GramMatrix(case.model, case.loader, nng.FMatImplicit)
    j = reference.jacobian(case.model, case.inputs).flatten(0, 1)
    f = nng.FVector(torch.randn(4, k.outputs, k.columns, dtype=f64))
    close(k.mv(f).flat(), f.flat() @ (j @ j.T))


class Counting(nn.Module):
    """Counts forward passes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.passes = nn.Linear(4, 6, dtype=f64), nn.Linear(6, 3, dtype=f64), 0

    def forward(self, x):
        self.passes += 1
        return self.b(self.a(x).tanh())


def test_one_forward_pass_serves_all_vectors():
    model, x = Counting(), torch.randn(7, 4, dtype=f64)
    y = torch.arange(7) % 3
    make = [
        nng.FIM(model, [x], nng.PMatImplicit),
        nng.EmpiricalFIM(model, [(x, y)], nng.PMatImplicit, loss="cross_entropy"),
        nng.Hessian(model, [(x, y)], loss="cross_entropy"),
        nng.GradientCovariance(model, [(x, y)], nng.PMatImplicit, loss="cross_entropy"),
    ]
    for m in make:
        passes = []
        for count in (2, 32):
            v = nng.PVector.randn(m.layer_collection, count, dtype=f64)
            m.mv(v)
            model.passes = 0
            m.mv(v)
            passes.append(model.passes)
        assert passes == [1, 1]


class Wrong(torch.autograd.Function):
    """A sine whose first derivative is right, and whose second is that of another function."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return _Bent.apply(g, ctx.saved_tensors[0])


class _Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(x)
        return g * x.cos()

    @staticmethod
    def backward(ctx, h):
        return 1.1 * h * ctx.saved_tensors[0].cos(), None


class Bent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6, dtype=f64), nn.Linear(6, 3, dtype=f64)

    def forward(self, x):
        return self.b(Wrong.apply(self.a(x)))


def test_wrong_derivatives_of_backward_passes_are_noticed():
    model, x = Bent(), torch.randn(7, 4, dtype=f64)
    expected = reference.fisher(model, x)
    m = nng.FIM(model, [x], nng.PMatImplicit)
    close(m.to_dense(), expected)
    k = nng.GramMatrix(model, [x], nng.FMatImplicit)
    j = reference.jacobian(model, x).flatten(0, 1)
    close(k.to_dense(), j @ j.T)


def test_no_vector_and_axes_of_vectors():
    m = measured("FIM", build("mlp"))
    dense = m.to_dense()
    v = nng.PVector.randn(m.layer_collection, 2, 3, dtype=f64)
    close(m.mv(v).flat(), v.flat() @ dense)
    none = nng.PVector(m.layer_collection, v.flat()[0, :0])
    assert m.mv(none).shape == (0, len(dense))


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer", "tied", "bare", "frozen"])
def test_layers_are_the_diagonal_blocks(name, measure):
    case = build(name)
    m = measured(measure, case)
    dense, table = m.to_dense(), m.layer_collection.offsets()
    layers = m.by_layer()
    assert list(layers) == list(dict.fromkeys(m.layer_collection.layers))
    for layer, part in layers.items():
        names = part.layer_collection.names
        assert set(part.layer_collection.layers) == {layer} and type(part) is type(m)
        at = torch.cat([torch.arange(table[n][0], table[n][0] + torch.Size(table[n][1]).numel()) for n in names])
        block = dense[at][:, at]
        torch.testing.assert_close(part.to_dense(), block, rtol=1e-8, atol=1e-9 * float(dense.abs().max()))
        close(part.trace(), block.trace(), 1e-7)
        close(m[layer].diag().flat(), block.diagonal(), 1e-7)


def test_spectra_a_layer():
    m = measured("Hessian", build("mlp"))
    for part in m.by_layer().values():
        values = torch.linalg.eigvalsh(part.to_dense())
        close(part.lanczos(3, "both")[0], values[[-1, -2, 0]], 1e-6)
        density = part.spectral_density(steps=len(values), samples=4)
        assert density.nodes.min() >= values[0] - 1e-9 and density.nodes.max() <= values[-1] + 1e-9
    assert torch.is_tensor((2 * m)["0"].trace())
    close((2 * m)["0"].to_dense(), 2 * m["0"].to_dense())


def test_unknown_layers():
    with pytest.raises(nng.CollectionError, match="'third' matches no parameter; the parameters are"):
        measured("FIM", build("mlp"))["third"]


# -- ends of the spectrum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
def test_largest_smallest_and_both(measure):
    m = measured(measure, build("mlp"))
    dense = m.to_dense()
    values = torch.linalg.eigvalsh(dense)
    for which, expected in (("largest", values.flip(0)[:4]), ("smallest", values[:4])):
        found, vectors = m.lanczos(4, which)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(values.abs().max()))
        residual = (vectors.flat() @ dense - found[:, None] * vectors.flat()).norm(dim=1)
        assert float(residual.max()) <= 1e-6 * float(values.abs().max())
    torch.testing.assert_close(m.lanczos(3, "both")[0], values[[-1, -2, 0]], rtol=1e-6, atol=1e-6 * float(values[-1]))
    every, _ = m.lanczos(len(values))
    torch.testing.assert_close(every, values.flip(0), rtol=1e-8, atol=1e-9 * float(values.abs().max()))
    close(m.norm(2), values.abs().max(), 1e-6)
    close((-3 * m).norm(2), 3 * values.abs().max(), 1e-6)
    close(m.norm(), dense.norm())


def test_norms_of_kernels():
    case = build("mlp")
    k = nng.GramMatrix(case.model, case.loader, nng.FMatImplicit)
    close(k.norm(2), torch.linalg.matrix_norm(k.to_dense(), 2), 1e-6)
    close((-2 * k).norm(2), 2 * torch.linalg.matrix_norm(k.to_dense(), 2), 1e-6)
    close(k.norm(), k.to_dense().norm())
    between = nng.GramMatrix(case.model, case.loader, nng.FMatImplicit, other=case.loader[:1])
    close(between.norm(2), torch.linalg.matrix_norm(between.to_dense(), 2), 1e-6)
    values = torch.linalg.eigvalsh(k.to_dense())
    found, vectors = k.lanczos(3, "smallest")
    torch.testing.assert_close(found, values[:3], rtol=0, atol=1e-6 * float(values[-1]))
    assert vectors.shape == (3, k.outputs, k.columns)


def test_factors_that_require_gradients():
    m = torch.tensor(2.0, dtype=f64, requires_grad=True) * measured("FIM", build("mlp"))
    top, _ = m.lanczos(2)
    assert not top.requires_grad
    close(top, torch.linalg.eigvalsh(m.to_dense().detach()).flip(0)[:2], 1e-6)
    assert not m.logdet(0.1, estimator="slq", samples=4).value.requires_grad


def test_unconverged_eigenvalues():
    case = build("mlp")
    for m in (measured("FIM", case), nng.GramMatrix(case.model, case.loader, nng.FMatImplicit)):
        with pytest.raises(nng.ConvergenceError, match="strict=False") as caught:
            m.lanczos(2, tol=1e-12, max_steps=3)
        values, vectors = caught.value.iterate
        assert values.shape == (2,) and len(vectors) == 2 if isinstance(vectors, list) else vectors.shape[0] == 2
        assert m.lanczos(2, tol=1e-12, max_steps=3, strict=False)[0].shape == (2,)
    with pytest.raises(nng.ArgumentError, match="k is 0"):
        m.lanczos(0)
