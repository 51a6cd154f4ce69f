"""The Kronecker products nearest to Hessians, covariances and centred Fisher matrices, against the singular value
decomposition of the rearranged blocks."""

import functools

import pytest
import torch
from cases import build

import nngeom as nng
from nngeom.core import linalg

f64 = torch.float64
MODELS = ("mlp", "conv2d", "depthwise", "embedding", "tied", "transformer")
MEASURES = {
    "hessian": functools.partial(nng.Hessian, loss="cross_entropy"),
    "covariance": functools.partial(nng.GradientCovariance, loss="cross_entropy"),
    "centred": functools.partial(nng.FIM, centered=True),
    "centred-ggn": functools.partial(nng.GGN, loss="mse", centered=True),
}
NEAREST = {"fit": "nearest", "fit_steps": 2000}


def require_nearest(m, dense):
    """No Kronecker product is nearer to any block of ``dense`` than that of ``m``."""
    seen = 0
    for layout, block in m.blocks.items():
        if not hasattr(block, "a"):
            continue
        at = layout.indices().flatten()
        whole = dense[at][:, at].view(*layout.sizes, *layout.sizes)
        for s in range(layout.sizes[0]):
            exact = whole[s, :, :, s]
            a, g = (torch.diag_embed(f) if linalg.is_diagonal(f) else f for f in (block.a, block.g))
            rearranged = exact.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # [(o p) (i j)]
            if linalg.is_diagonal(block.a):
                i = exact.shape[1]
                rearranged = rearranged.view(-1, i, i).diagonal(dim1=1, dim2=2)
            size = exact.square().sum()
            best = size - torch.linalg.svdvals(rearranged)[0].square()
            assert (torch.einsum("op,ij->oipj", g[s], a[s]) - exact).square().sum() <= best + 1e-8 * size
            seen += 1
    assert seen


@functools.cache
def measured(name, measure):
    torch.set_num_threads(1)
    case = build(name)
    make = lambda kind, **options: MEASURES[measure](case.model, case.loader, kind, **options)
    return make, make(nng.PMatDense).to_dense(), make(nng.PMatKFAC, **NEAREST)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", MODELS)
def test_nearest(name, measure):
    make, dense, m = measured(name, measure)
    assert type(m) is nng.PMatKFAC and m.examples == build(name).n
    require_nearest(m, dense)
    if measure != "hessian":
        values = m.eigh()[0]
        assert float(values.min()) >= -1e-9 * float(values.max())


def test_a_hessian_that_is_a_kronecker_product():
    """Of one linear layer and the squared error: exact."""
    layer = torch.nn.Linear(4, 3).double()
    data = [(torch.randn(9, 4, dtype=f64), torch.randn(9, 3, dtype=f64))]
    exact = nng.Hessian(layer, data, nng.PMatDense, loss="mse").to_dense()
    m = nng.Hessian(layer, data, nng.PMatKFAC, loss="mse", fit="nearest")
    torch.testing.assert_close(m.to_dense(), exact, rtol=1e-9, atol=1e-12)


def test_indefinite_ones_are_solved_with_when_asked():
    make, dense, m = measured("mlp", "hessian")
    whole = m.to_dense()
    least = float(torch.linalg.eigvalsh(whole).min())
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    x = 0.37 * abs(least) + 1e-3
    if least < -x:
        with pytest.raises(nng.SingularError):
            m.solve(v, x)
    damped = whole + x * torch.eye(len(whole), dtype=f64)
    found = m.solve(v, x, indefinite=True).flat()
    torch.testing.assert_close(damped @ found, v.flat(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("measure", ["hessian", "covariance"])
def test_cut_mixed_and_subclassed_are_the_same(measure):
    make, dense, m = measured("mlp", measure)
    tight = make(nng.PMatKFAC.options(**NEAREST), memory_budget=20_000)
    torch.testing.assert_close(tight.to_dense(), m.to_dense(), rtol=1e-6, atol=1e-10)

    class Mine(nng.PMatKFAC):
        pass

    assert torch.equal(make(Mine, **NEAREST).to_dense(), m.to_dense())
    mixed = nng.PMatMixed({"0.*": nng.PMatKFAC.options(**NEAREST)}, default=nng.PMatDiag)
    if measure == "hessian":
        with pytest.raises(nng.UnsupportedError, match="fit='nearest'"):
            make(mixed)
    else:
        torch.testing.assert_close(make(mixed)["0"].to_dense(), m["0"].to_dense(), rtol=1e-6, atol=1e-10)


def test_parameters_that_the_data_does_not_use():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)).double()
    data = [(torch.randn(5, 3, dtype=f64), torch.zeros(5, dtype=torch.long))]
    first = lambda x, y: model[1](x)
    for measure in (nng.Hessian, nng.GradientCovariance):
        exact = measure(model, data, nng.PMatDense, loss="cross_entropy", function=first).to_dense()
        m = measure(model, data, nng.PMatKFAC, loss="cross_entropy", function=first, **NEAREST)
        assert not m["0"].to_dense().any()
        require_nearest(m["1"], exact[12:, 12:])


def test_warnings_and_errors():
    case = build("conv2d")
    for measure in (nng.Hessian, nng.GradientCovariance):
        with pytest.raises(nng.UnsupportedError, match="fit='nearest'"):
            measure(case.model, case.loader, nng.PMatKFAC, loss="cross_entropy")
        with pytest.warns(nng.FitWarning, match="fit_steps=2"):
            measure(case.model, case.loader, nng.PMatKFAC, loss="cross_entropy", fit="nearest", fit_steps=2)
        for options, match in (
            ({"fit": "nearest", "fit_steps": 1}, "fit_steps is 1"),
            ({"fit": "nearest", "sua": True}, "sua"),
            ({"fit": "nearest", "factor_form": "low_rank"}, "factor_form='diagonal'"),
        ):
            with pytest.raises(nng.NNGeomError, match=match):
                measure(case.model, case.loader, nng.PMatKFAC, loss="cross_entropy", **options)
    with pytest.raises(nng.UnsupportedError, match="several sweeps"):
        nng.FIM(case.model, case.loader, nng.PMatKFAC, estimator="rademacher", samples=4, fit="nearest")
