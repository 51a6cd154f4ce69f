"""One dtype a matrix, the widest of its layers, and sums wide enough for what is summed."""

import copy

import pytest
import reference
import torch
from cases import PARAMETER_SPACE, STORED, build, representation
from small import model_of, normal
from torch import nn

import nngeom as nng

f64 = torch.float64


@pytest.mark.parametrize("kind", PARAMETER_SPACE)
def test_float64_models_under_the_float32_default(kind):
    case = build("layer-norm")
    m = nng.FIM(case.model, case.loader, representation(kind, case.model))
    assert m.dtype == f64 and m.mv(nng.PVector.randn(m.layer_collection)).dtype == f64 and m.to_dense().dtype == f64


@pytest.mark.parametrize("kind", STORED)
def test_layers_of_different_dtypes(kind):
    """One matrix has one dtype, the widest of its layers; no layer is rounded to that of another."""
    x = normal(6, 3)
    whole = model_of(nn.Linear(3, 4), nn.Linear(4, 3))
    model = nn.Sequential(nn.Linear(3, 4).float(), nn.Linear(4, 3).double())
    model[0].load_state_dict(whole[0].state_dict()), model[1].load_state_dict(whole[1].state_dict())
    whole[0].load_state_dict(model[0].state_dict())
    f = lambda m, d: lambda a: m[1](m[0](a.to(d)).double().tanh())
    v = nng.PVector.randn(nng.LayerCollection.from_model(whole), generator=torch.Generator().manual_seed(0), dtype=f64)
    a, b = (
        nng.FIM(m, (x,), representation(kind, m), function=f(m, d)) for m, d in ((model, torch.float32), (whole, f64))
    )
    tensors = [t for block in a.blocks.values() for t in block.fields().values() if isinstance(t, torch.Tensor)]
    assert a.dtype == f64 and {t.dtype for t in tensors} == {f64}
    torch.testing.assert_close(a.mv(v).flat(), b.mv(v).flat(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(a.solve(v, 0.1).flat(), b.solve(v, 0.1).flat(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.diag()["1.weight"], b.diag()["1.weight"], rtol=1e-5, atol=1e-8)


@pytest.fixture
def in_two_dtypes():
    """A model of layers in two dtypes, inputs, and its rows in double precision."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.conv, self.wide = nn.Linear(4, 5), nn.Conv1d(1, 2, 2), nn.Linear(5, 3).double()

        def forward(self, x):
            beside = self.conv(x.unsqueeze(1)).flatten(1).sum(1, keepdim=True)
            return self.wide(torch.tanh(self.narrow(x) + beside).double())

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(6, 4)
    return model, x, reference.jacobian(copy.deepcopy(model).double(), x.double())


def test_rows_of_layers_in_two_dtypes(in_two_dtypes):
    model, x, rows = in_two_dtypes
    torch.testing.assert_close(nng.Jacobian(model, [x]).tensor.double(), rows, rtol=1e-4, atol=1e-5)


def test_kernels_of_layers_in_two_dtypes(in_two_dtypes):
    model, x, rows = in_two_dtypes
    kernel = torch.einsum("cnd,emd->cnem", rows, rows)
    torch.testing.assert_close(nng.GramMatrix(model, [x]).tensor.double(), kernel, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", STORED)
def test_sums_of_bfloat16_do_not_stall(kind):
    model = nn.Linear(1, 2, bias=False).to(torch.bfloat16)
    model.weight.data.zero_()
    x = torch.ones(3000, 1, dtype=torch.bfloat16)
    m = nng.FIM(model, list(x.split(30)), representation(kind, model))
    assert m.dtype == torch.float32
    torch.testing.assert_close(m.trace(), torch.tensor(0.5), rtol=1e-2, atol=0)


def test_squares_of_float16_do_not_overflow():
    half = nn.Linear(4, 2).half()
    big = nng.FIM(half, [300 * torch.ones(5, 4, dtype=torch.float16)], nng.PMatDiag, likelihood="gaussian")
    torch.testing.assert_close(big.diag().flat()[0], torch.tensor(300.0**2))


@pytest.mark.parametrize("kind", PARAMETER_SPACE)
def test_autocast_is_half_precision_near_the_truth(kind):
    model, x = model_of(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).float(), torch.randn(10, 6)
    r = representation(kind, model)
    exact_m = nng.FIM(model, [x], r)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m = nng.FIM(model, [x], r)
    assert m.dtype == torch.float32
    torch.testing.assert_close(m.trace(), exact_m.trace(), rtol=0.03, atol=0)


def test_centring_does_not_cancel():
    x = 1e4 + torch.randn(8, 5)
    model = nn.Linear(5, 1, bias=False)
    k = nng.GramMatrix(model, [x], centered=True).to_dense().double()
    rows = (x - x.mean(0)).double()
    assert (k - rows @ rows.T).norm() / (rows @ rows.T).norm() < 1e-2
    assert torch.linalg.eigvalsh(k).min() > -1e-2 * k.norm()
    for kind in (nng.FMatDiag, nng.FMatBlockDiag):
        trace = nng.GramMatrix(model, [x[:5], x[5:]], kind, centered=True).trace()
        torch.testing.assert_close(trace.double(), rows.square().sum(), rtol=1e-2, atol=0)
