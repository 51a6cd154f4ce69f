"""NaN and infinity are named where they come from, in every result; what only looks large is finite."""

import pytest
import torch
from cases import build
from small import model_of, normal
from torch import nn

import nngeom as nng

f64 = torch.float64


def test_saturated_softmax_is_finite():
    model = model_of(nn.Linear(4, 3))
    m = nng.FIM(model, [1e4 * normal(6, 4)], nng.PMatDense)
    assert bool(torch.isfinite(m.to_dense()).all())


def test_non_finite_inputs_name_the_examples():
    x = normal(6, 4)
    x[4] = float("nan")
    with pytest.raises(nng.NonFiniteError, match=r"batch 0 .*examples \[4\]"):
        nng.FIM(build("mlp").model, [x], nng.PMatDiag)


class Root(nn.Module):
    """Finite outputs whose gradient in the first layer is infinite where its output is zero."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3, bias=False, dtype=f64), nn.Linear(3, 2, dtype=f64)

    def forward(self, x):
        return self.second(self.first(x).abs().sqrt())


RESULTS = {
    "fisher": lambda m, x: nng.FIM(m, x, nng.PMatDense),
    "kfac": lambda m, x: nng.FIM(m, x, nng.PMatKFAC),
    "ekfac": lambda m, x: nng.FIM(m, x, nng.PMatEKFAC),
    "diagonal": lambda m, x: nng.FIM(m, x, nng.PMatDiag),
    "kernel": lambda m, x: nng.GramMatrix(m, x),
    "columns": lambda m, x: nng.GramMatrix(m, x[:1], other=x),
    "squared norms": lambda m, x: nng.GramMatrix(m, x, nng.FMatDiag),
    "blocks": lambda m, x: nng.GramMatrices(m, x, nng.FMatBlockDiag),
    "rows": lambda m, x: nng.Jacobian(m, x),
    "implicit": lambda m, x: nng.GramMatrix(m, x[::-1], nng.FMatImplicit),
}


@pytest.mark.parametrize("result", RESULTS)
def test_gradients_that_are_not_finite_are_found_in_every_result(result):
    x = normal(8, 4)
    x[6] = 0
    with pytest.raises(nng.NonFiniteError, match=r"'first'.*batch \d, examples \[2\]"):
        RESULTS[result](Root(), [(x[:4],), (x[4:],)])


def test_solves_by_products_raise_where_gradients_are_not_finite():
    x = torch.zeros(4, 4, dtype=f64)
    m = nng.FIM(Root(), [x], nng.PMatImplicit)
    with pytest.raises(nng.NonFiniteError, match="met NaN"):
        m.solve(nng.PVector.randn(m.layer_collection, dtype=f64), 0.1)


def test_solves_by_products_raise_where_the_vector_is_not_finite():
    case = build("mlp")
    m = nng.FIM(case.model, case.loader, nng.PMatImplicit)
    with pytest.raises(nng.NonFiniteError, match="met NaN"):
        m.solve(nng.PVector.from_model(case.model) * float("nan"), 0.1)


class Masked(nn.Module):
    """Finite outputs of inputs that are not, as where padding is left out after a layer."""

    def __init__(self, *, sort=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.sort = nn.Linear(4, 3, dtype=f64), nn.Linear(3, 2, dtype=f64), sort

    def forward(self, x):
        there = torch.isfinite(x).all(1, keepdim=True)
        order = x[:, 0].nan_to_num(0, 0, 0).argsort() if self.sort else torch.arange(len(x))
        h = self.first(x[order])[order.argsort()]
        return self.second(torch.where(there, h.tanh(), 0.0))


BAD = {"infinite": float("inf"), "nan": float("nan"), "overflowing": 1e300}
FIRST = {
    **RESULTS,
    "diagnosis": lambda m, x: nng.diagnose(m, x[0]),
    "explanation": lambda m, x: nng.explain(m, x[0]),
    "penalty": lambda m, x: nng.mgs.trace_penalty(m, x[0]),
    "training": lambda m, x: _trained(m, x[0]),
}


def _trained(model, x):
    opt = nng.optim.KFAC(model)
    with opt.observe():
        model(x).square().sum().backward()
    with pytest.warns(nng.optim.SkippedStepWarning):
        opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("make", [Masked, lambda: Masked(sort=True), lambda: build("mlp").model])
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("bad", BAD)
def test_nothing_follows_from_numbers_that_are_not_finite(make, first, bad):
    x = normal(6, 4)
    given = x.clone()
    given[2] = BAD[bad]
    model, fresh = make(), make()
    fresh.load_state_dict(model.state_dict())
    try:
        FIRST[first](model, [given])
    except (nng.NonFiniteError, nng.MemoryWarning):
        pass  # and no other error
    except pytest.fail.Exception:
        assert first == "training" and bad == "overflowing"
    for kind in (nng.PMatKFAC, nng.PMatDense):
        expected = nng.FIM(fresh, [x], kind)
        got = nng.FIM(model, [x], kind)
        assert [type(b) for b in got.blocks.values()] == [type(b) for b in expected.blocks.values()]
        torch.testing.assert_close(got.to_dense(), expected.to_dense())


Y = torch.arange(6) % 2
QUANTITIES = {
    "coherence": lambda m, x: nng.analysis.coherence(m, (x, Y)),
    "stiffness": lambda m, x: nng.analysis.stiffness(m, (x, Y)),
    "stiffness with others": lambda m, x: nng.analysis.stiffness(m, (normal(6, 4), Y), other=(x, Y)),
    "alignment": lambda m, x: nng.analysis.label_alignment(m, (x, Y)),
    "alignment by layer": lambda m, x: nng.analysis.label_alignment(m, (x, Y), by_layer=True),
    "sharpness": lambda m, x: nng.analysis.sharpness(m, (x, Y)),
    "Fisher-Rao norm": lambda m, x: nng.analysis.fisher_rao_norm(m, x),
    "complexity": lambda m, x: nng.analysis.ComplexityMeasure(m, [x]),
    "eigenfunctions": lambda m, x: nng.analysis.eigenfunctions(m, x, 2),
    "linearity": lambda m, x: nng.linearized.linearity(m, m, [x]),
    "metrics": lambda m, x: nng.mgs.metrics(m, x),
    "scores": lambda m, x: nng.mgs.sample_trace(m, x),
    "Fisher scores": lambda m, x: nng.mgs.sample_fisher_trace(m, x),
    "winsorized": lambda m, x: nng.optim.winsorized_gradient(m, (x, Y), "cross_entropy", 20),
    "median of means": lambda m, x: nng.optim.median_of_means_gradient(m, (x, Y), "cross_entropy", 6),
    "kernel": lambda m, x: nng.GramMatrix(m, x),
    "its diagonal": lambda m, x: nng.GramMatrix(m, x, nng.FMatDiag),
    "its layers": lambda m, x: nng.GramMatrices(m, x),
    "influence": lambda m, x: nng.influence(
        m, (x, Y), (normal(6, 4), Y), nng.FIM(m, normal(6, 4), nng.PMatDiag), loss="cross_entropy", damping=0.1
    ),
}


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("bad", ["infinite", "nan"])
def test_rows_that_are_not_finite_behind_finite_outputs_are_refused(quantity, bad):
    x = normal(6, 4)
    x[2] = BAD[bad]
    model = Masked()
    assert bool(torch.isfinite(model(x)).all())
    with pytest.raises(nng.NonFiniteError):
        QUANTITIES[quantity](model, x)
