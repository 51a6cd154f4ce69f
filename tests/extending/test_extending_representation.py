"""A representation from outside, with blocks of its own, under everything that takes one."""

import pickle

import pytest
import reference
import torch
from cases import build
from trained import EXACT, close, cross_entropy, step
from unit_eye import PMatUnitEye, UnitEye

import nngeom as nng
from nngeom.optim import NaturalGradient

MODELS = ("mlp", "conv2d", "transformer", "language-model", "gru", "reused", "embedding")


def of_units(m, truth):
    """The diagonal ``(d,)`` whose entries are means over the incoming weights of a unit."""
    out = torch.zeros(len(truth), dtype=truth.dtype)
    for layout in m.blocks:
        block = layout.gather(truth.diagonal())
        layout.scatter_(out, block.mean(-1, keepdim=True).expand(block.shape))
    return out


def measured(name="mlp", **options):
    case = build(name)
    return case, nng.FIM(case.model, case.loader, PMatUnitEye, **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [None, 20_000])
def test_every_measure(name, budget):
    case = build(name)
    fisher = reference.fisher(case.model, case.inputs)
    g = reference.loss_gradients(case.model, case.inputs, case.targets, cross_entropy)
    centred = g - g.mean(0)
    options = {"memory_budget": budget}
    for measure, truth, more in (
        (nng.FIM, fisher, {}),
        (nng.GGN, fisher, {"loss": "cross_entropy"}),
        (nng.EmpiricalFIM, g.T @ g / len(g), {"loss": "cross_entropy"}),
        (nng.GradientCovariance, centred.T @ centred / len(g), {"loss": "cross_entropy"}),
    ):
        m = measure(case.model, case.loader, PMatUnitEye, **more, **options)
        assert type(m) is PMatUnitEye
        close(m.to_dense(), torch.diag(of_units(m, truth)))
        close(m.trace(), truth.trace())


def test_draws_and_probes():
    case, m = measured()
    drawn = nng.FIM_MonteCarlo(case.model, case.loader, PMatUnitEye, samples=300)
    close(drawn.trace(), m.trace(), 0.1)
    probed = nng.FIM(case.model, case.loader, PMatUnitEye, estimator="rademacher", samples=300)
    assert type(probed.matrix) is PMatUnitEye
    close(probed.matrix.trace(), m.trace(), 0.1)


def test_hessians_are_refused_for_what_they_are():
    case = build("mlp")
    with pytest.raises(nng.UnsupportedError, match="average of outer products"):
        nng.Hessian(case.model, case.loader, PMatUnitEye, loss="cross_entropy")


@pytest.mark.parametrize("name", ("mlp", "conv2d", "language-model"))
def test_algebra(name):
    case, m = measured(name)
    dense = m.to_dense()
    d, eye = len(dense), torch.eye(len(dense), dtype=dense.dtype)
    v = nng.PVector.randn(m.layer_collection, 2, dtype=torch.float64)
    close(m @ v, v.flat() @ dense)
    close(m.vTMv(v), ((v.flat() @ dense) * v.flat()).sum(-1))
    close(m.norm(), dense.norm())
    close(m.solve(v, 0.1), torch.linalg.solve(dense + 0.1 * eye, v.flat().T).T)
    close(m.inverse(0.1).to_dense(), torch.linalg.inv(dense + 0.1 * eye))
    close(m.solve(v, nng.Cutoff(1e-6)), v.flat() @ torch.linalg.pinv(dense))
    close(m.logdet(0.1), torch.logdet(dense + 0.1 * eye))
    values, basis = m.eigh()
    close(values, torch.linalg.eigvalsh(dense))
    close((basis.to_dense() * values) @ basis.to_dense().T, dense)
    draws = m.sample(4000, 1.0, torch.Generator().manual_seed(0)).flat()
    assert float((draws.T @ draws / 4000 - torch.linalg.inv(dense + eye)).norm()) < 0.05 * d
    with pytest.raises(nng.SingularError, match="unit-wise matrix is singular"):
        (-1.0 * m).solve(v, 1e-9)


def test_sums_and_merging():
    case, m = measured()
    assert type(m + m) is PMatUnitEye and type(m - 0.5 * m) is PMatUnitEye
    close((m - 0.5 * m).to_dense(), 0.5 * m.to_dense())
    kfac = nng.FIM(case.model, case.loader, nng.PMatKFAC)
    v = nng.PVector.randn(m.layer_collection, dtype=torch.float64)
    total = m + kfac
    close(total @ v, m @ v + kfac @ v)
    close(total.to_dense() @ total.solve(v, 0.1).flat() + 0.1 * total.solve(v, 0.1).flat(), v, 1e-5)
    halves = [nng.FIM(case.model, [batch], PMatUnitEye) for batch in case.loader]
    close(nng.merge(*halves).to_dense(), m.to_dense())


def test_mixtures():
    case, m = measured()
    for other in (nng.PMatKFAC, nng.PMatEKFAC, nng.PMatLowRank):
        mixed = nng.FIM(case.model, case.loader, nng.PMatMixed({"0": PMatUnitEye}, default=other))
        assert any(isinstance(block, UnitEye) for block in mixed.blocks.values())
        own = m.diag()["0.weight"]
        close(mixed.diag()["0.weight"], own)
        if other is nng.PMatLowRank:
            close(mixed.diag()["2.weight"], nng.FIM(case.model, case.loader, nng.PMatDiag).diag()["2.weight"])


def test_files(tmp_path):
    _, m = measured("conv2d")
    for x in (m, m.inverse(0.1), m.to(torch.float32)):
        nng.save(x, tmp_path / "m")
        for copy in (nng.load(tmp_path / "m"), pickle.loads(pickle.dumps(x))):
            assert type(copy) is PMatUnitEye and copy.dtype == x.dtype and torch.equal(copy.to_dense(), x.to_dense())
    assert m.to("cpu").device == m.device


@pytest.mark.parametrize("name", ("mlp", "conv2d", "language-model"))
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_a_step_of_an_optimizer_is_the_solve(name, reduction):
    case = build(name, sizes=(8,))
    x, y = case.loader[0]
    opt = NaturalGradient(case.model, PMatUnitEye, **EXACT)
    for _ in range(2):
        matrix = nng.EmpiricalFIM(case.model, (x, y), PMatUnitEye, loss="cross_entropy")
        gradient, moved = step(opt, case.model, x, y, reduction=reduction)
        close(moved, matrix.solve(gradient, 1e-2))


def test_explain_asks_it():
    for name in MODELS:
        case = build(name)
        first = {layout.names[0] for chunk in nng.rows(case.model, case.loader) for layout in chunk.jacobians}
        held = [row.numbers["UnitEye"] for row in nng.explain(case.model, case.loader[0]).rows if row.name in first]
        m = nng.FIM(case.model, case.loader, PMatUnitEye)
        assert sum(held) == m.nbytes() // 8


def test_it_is_an_approximation_as_good_as_its_trace():
    case, m = measured()
    table = nng.approximation_report({"mine": m}, nng.FIM(case.model, case.loader, nng.PMatDense))
    assert table["mine", "trace"] < 1e-12 and table["mine", "frobenius"] > 0


def test_options_that_it_does_not_have():
    with pytest.raises(nng.ArgumentError, match="PMatUnitEye has no option"):
        measured(sharing="reduce")


def test_blocks_that_it_does_not_take_are_kept_by_the_rest():
    class PMatSmall(PMatUnitEye):
        """Of blocks of few parameters."""

        @classmethod
        def takes(cls, rows, **options):
            return rows.shape[2] * rows.shape[3] * rows.shape[4] < 20

    case = build("mlp", sizes=(8,))
    x, y = case.loader[0]
    sizes = [layout.numel for layout in next(nng.rows(case.model, case.loader)).jacobians]
    assert [size < 20 for size in sizes] == [False, True]
    apart = nng.PMatMixed({"2": PMatUnitEye}, default=nng.PMatDiag)
    matrix = nng.EmpiricalFIM(case.model, (x, y), apart, loss="cross_entropy")
    gradient, moved = step(NaturalGradient(case.model, PMatSmall, **EXACT), case.model, x, y)
    close(moved, matrix.solve(gradient, 1e-2))
