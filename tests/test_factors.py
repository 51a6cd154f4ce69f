"""Kronecker factors of layers used at several positions, of dead units, and of layers too large for them."""

import pytest
import reference
import torch
from cases import build
from small import Function, model_of, normal
from torch import nn
from torch.nn import functional as F

import nngeom as nng

f64 = torch.float64


def test_the_input_factor_of_a_dilated_convolution():
    conv = nn.Conv2d(2, 3, 3, dilation=2, padding=1, bias=False).double()
    x = normal(5, 2, 7, 7)
    m = nng.FIM(nn.Sequential(conv, nn.Flatten(), nn.Linear(75, 3).double()), [x], nng.PMatKFAC)
    patches = F.unfold(x, 3, dilation=2, padding=1)
    expected = torch.einsum("nit,njt->ij", patches, patches) / 5
    factor = next(b.a for lay, b in m.blocks.items() if lay.names == ("0.weight",))
    torch.testing.assert_close(factor[0], expected)


def test_kfac_of_a_sequence_is_that_of_the_equivalent_convolution():
    linear, conv = nn.Linear(3, 2).double(), nn.Conv1d(3, 2, 1).double()
    conv.weight.data, conv.bias.data = linear.weight.data.unsqueeze(-1).clone(), linear.bias.data.clone()
    x = normal(5, 7, 3)
    a = nng.FIM(Function(lambda m, x: m.l(x).sin().sum(1), l=linear), [x], nng.PMatKFAC, likelihood="gaussian")
    b = nng.FIM(
        Function(lambda m, x: m.c(x.transpose(1, 2)).sin().sum(2), c=conv), [x], nng.PMatKFAC, likelihood="gaussian"
    )
    torch.testing.assert_close(a.to_dense(), b.to_dense())


@pytest.mark.parametrize(
    ("sharing", "outputs"), [("expand", lambda m, x: m.l(x).flatten(1)), ("reduce", lambda m, x: m.l(x).mean(1))]
)
def test_sharing_is_exact_where_it_should_be(sharing, outputs):
    """Linear networks: expand when every position has its own loss, reduce when positions are averaged
    (Eschenhagen et al. 2023).
    """
    model, x = Function(outputs, l=nn.Linear(3, 2).double()), normal(5, 4, 3)
    f = nng.FIM(model, [x], nng.PMatDense, likelihood="gaussian").to_dense()
    kfac = nng.FIM(model, [x], nng.PMatKFAC, likelihood="gaussian", sharing=sharing)
    torch.testing.assert_close(kfac.to_dense(), f)


def test_kfac_of_a_reused_module_counts_both_calls():
    layer = nn.Linear(3, 3, bias=False).double()
    twice = Function(lambda m, x: torch.cat([m.l(x[:, :3]), m.l(x[:, 3:])], 1), l=layer)
    x = normal(5, 6)
    folded = Function(lambda m, x: m.l(x.view(-1, 2, 3)).flatten(1), l=layer)
    a, b = (nng.FIM(m, [x], nng.PMatKFAC, likelihood="gaussian") for m in (twice, folded))
    torch.testing.assert_close(a.to_dense(), b.to_dense())


def test_spatially_uncorrelated_activations():
    case = build("conv2d")
    f = nng.FIM(case.model, case.loader, nng.PMatBlockDiag).to_dense()
    kfac, ekfac = (nng.FIM(case.model, case.loader, r, sua=True) for r in (nng.PMatKFAC, nng.PMatEKFAC))
    torch.testing.assert_close(ekfac.trace(), f.trace())
    assert (ekfac.to_dense() - f).norm() <= (kfac.to_dense() - f).norm() * (1 + 1e-9)


def test_dead_units_have_finite_inverses():
    model = model_of(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    model[0].bias.data.fill_(-100)
    m = nng.FIM(model, [normal(6, 4)], nng.PMatKFAC)
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    for damping in (1e-3, nng.FactoredTikhonov(1e-3), nng.Cutoff(1e-6)):
        assert bool(torch.isfinite(m.solve(v, damping).flat()).all())
    assert m.logdet() == -torch.inf
    with pytest.raises(nng.SingularError, match="damping"):
        m.solve(v)


def test_a_large_table_of_positions_keeps_its_structure():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Parameter(0.1 * normal(1, 70, 60)), nn.Linear(60, 3)

        def forward(self, x):
            return self.head(torch.tanh(x + self.table).mean(1))

    model, x = Model().double(), normal(3, 70, 60)
    assert nng.explain(model, x)["table"].structure == "lookup"
    f = reference.fisher(model, x)
    torch.testing.assert_close(nng.FIM(model, [x], nng.PMatDiag).diag().flat(), f.diagonal(), rtol=1e-8, atol=1e-14)
    kfac, ekfac = (nng.FIM(model, [x], r) for r in (nng.PMatKFAC, nng.PMatEKFAC))
    torch.testing.assert_close(ekfac.trace(), f.trace())
    assert kfac.nbytes() < 8 * 70 * 60 * 60


def test_a_factor_above_the_limit_is_kept_diagonal():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 10_050, bias=False)).double()
    x = normal(4, 3)
    kfac = nng.FIM_MonteCarlo(model, [x], nng.PMatKFAC, samples=2, generator=torch.Generator().manual_seed(0))
    big = next(b for lay, b in kfac.blocks.items() if lay.names == ("2.weight",))
    assert big.g.shape == (1, 10_050)
    diag = nng.FIM_MonteCarlo(model, [x], nng.PMatDiag, samples=2, generator=torch.Generator().manual_seed(0))
    ekfac = nng.FIM_MonteCarlo(model, [x], nng.PMatEKFAC, samples=2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ekfac.trace(), diag.trace())
    v = nng.PVector.randn(kfac.layer_collection, dtype=f64)
    torch.testing.assert_close(kfac.solve(kfac.mv(v) + 0.1 * v, 0.1).flat(), v.flat())


def test_eigendecompositions_survive_a_failure_of_lapack(monkeypatch):
    from nngeom.core import linalg

    x = normal(6, 6)
    m, calls, fails, eigh = x @ x.T, [], [0], torch.linalg.eigh

    def failing(a):
        calls.append(1)
        if len(calls) <= fails[0]:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(a)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    for count in (1, 2):
        fails[0] = count
        calls.clear()
        values, vectors = linalg.eigh(m)
        torch.testing.assert_close((vectors * values) @ vectors.T, m, rtol=1e-8, atol=1e-8)
        assert bool((values.diff() >= 0).all())


def test_eigenvectors_are_contiguous():
    from nngeom.core import linalg

    x = normal(5, 5)
    assert linalg.eigh(x @ x.T)[1].is_contiguous()
