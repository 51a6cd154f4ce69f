"""A likelihood from outside, under everything that takes one."""

import pytest
import reference
import torch
from cases import DIAGONAL, STORED, TRACE, WHOLE, build, representation
from geometric import Geometric
from torch import nn
from trained import EXACT, close, step

import nngeom as nng
from nngeom.optim import NaturalGradient

MODELS = ("mlp", "conv2d", "transformer", "gru")


def loss(outputs, targets):
    """Of counts, one number an example."""
    return -Geometric().log_prob(outputs, targets)


def made(name):
    case = build(name)
    torch.manual_seed(2)
    counts = [torch.randint(0, 5, case.model(x).shape).double() for x, _ in case.loader]
    loader = [(x, y) for (x, _), y in zip(case.loader, counts)]
    return case, loader, torch.cat(counts)


def truth(case, weights=None):
    """``J^T diag(1 - p) J``, with further ``weights (n, c)`` of the outputs."""
    f = case.model(case.inputs).detach()
    variance = torch.sigmoid(-f) * (1 if weights is None else weights(f))
    return reference.sandwich(reference.jacobian(case.model, case.inputs), torch.diag_embed(variance))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", STORED)
def test_exact_matrices_in_every_representation(name, kind):
    case, loader, _ = made(name)
    fisher, held = truth(case), representation(kind, case.model)
    m = nng.FIM(case.model, loader, held, likelihood=Geometric())
    small = nng.FIM(case.model, loader, held, likelihood=Geometric(), memory_budget=200_000)
    close(small.to_dense(), m.to_dense(), 1e-7)
    if kind in WHOLE:
        close(m.to_dense(), fisher)
    if kind in DIAGONAL:
        close(m.diag(), fisher.diagonal())
    if kind in TRACE:
        close(m.trace(), fisher.trace())


def test_products_draws_and_probes():
    case, loader, _ = made("mlp")
    fisher, g = truth(case), torch.Generator().manual_seed(0)
    implicit = nng.FIM(case.model, loader, nng.PMatImplicit, likelihood=Geometric())
    v = nng.PVector.randn(implicit.layer_collection, dtype=torch.float64)
    close(implicit @ v, fisher @ v.flat())
    drawn = nng.FIM_MonteCarlo(case.model, loader, nng.PMatDense, likelihood=Geometric(), samples=3000, generator=g)
    assert (drawn.to_dense() - fisher).norm() < 0.1 * fisher.norm()
    again = nng.FIM_MonteCarlo(case.model, [(case.inputs,)], nng.PMatDiag, likelihood=Geometric(), generator=g)
    apart = [(case.inputs[:2],), (case.inputs[2:],)]
    g.manual_seed(g.initial_seed())
    first = nng.FIM_MonteCarlo(case.model, apart, nng.PMatDiag, likelihood=Geometric(), generator=g)
    g.manual_seed(g.initial_seed())
    whole = nng.FIM_MonteCarlo(case.model, [(case.inputs,)], nng.PMatDiag, likelihood=Geometric(), generator=g)
    close(first.diag(), whole.diag())
    assert not torch.equal(again.diag().flat(), whole.diag().flat())
    probed = nng.FIM(case.model, loader, nng.PMatDense, likelihood=Geometric(), estimator="rademacher", samples=3000)
    assert (probed.matrix.to_dense() - fisher).norm() < 0.1 * fisher.norm()


@pytest.mark.parametrize("name", ("mlp", "conv2d", "gru", "residual"))
def test_its_negative_logarithm_is_a_loss(name):
    case, loader, counts = made(name)
    at = lambda f: torch.sigmoid(f) * (1 + counts)  # the second derivative is (1 + y) p (1 - p)
    close(nng.GGN(case.model, loader, nng.PMatDense, loss=loss).to_dense(), truth(case, at))
    g = reference.loss_gradients(case.model, case.inputs, counts, loss)
    centred = g - g.mean(0)
    close(nng.EmpiricalFIM(case.model, loader, nng.PMatDense, loss=loss).to_dense(), g.T @ g / case.n)
    close(nng.GradientCovariance(case.model, loader, nng.PMatDense, loss=loss).to_dense(), centred.T @ centred / case.n)
    hessian = reference.hessian(case.model, case.inputs, counts, loss)
    close(nng.Hessian(case.model, loader, nng.PMatDense, loss=loss).to_dense(), hessian)


def test_outputs_at_positions():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(6, 5, 4, dtype=torch.float64)
    j = reference.jacobian(model, x)
    variance = torch.sigmoid(-model(x).detach()).flatten(1)
    m = nng.FIM(model, [(x,)], nng.PMatDense, likelihood=Geometric())
    close(m.to_dense(), reference.sandwich(j, torch.diag_embed(variance)))


def test_files_sums_and_mixtures(tmp_path):
    case, loader, _ = made("mlp")
    measured = lambda kind: nng.FIM(case.model, loader, kind, likelihood=Geometric())
    mixed = measured(nng.PMatMixed({"0": nng.PMatDiag}, default=nng.PMatDense))
    nng.save(mixed, tmp_path / "m")
    assert torch.equal(nng.load(tmp_path / "m").to_dense(), mixed.to_dense())
    total = measured(nng.PMatKFAC) + measured(nng.PMatEKFAC)
    close(total.trace(), measured(nng.PMatKFAC).trace() + truth(case).trace())
    rescaled = nng.FIM(case.model, loader, nng.PMatEKFAC).rescaled(case.model, loader, likelihood=Geometric())
    close(rescaled.trace(), truth(case).trace())


@pytest.mark.parametrize("kind", [nng.PMatKFAC, nng.PMatEKFAC, nng.PMatDiag])
def test_a_step_of_an_optimizer_is_the_solve(kind):
    case, loader, _ = made("mlp")
    x, y = loader[0]
    opt = NaturalGradient(case.model, kind, fisher="exact", likelihood=Geometric(), **EXACT)
    matrix = nng.FIM(case.model, [(x, y)], kind, likelihood=Geometric())
    gradient, moved = step(opt, case.model, x, y, loss)
    close(moved, matrix.solve(gradient, 1e-2))
    drawn = NaturalGradient(case.model, kind, fisher="monte_carlo", likelihood=Geometric(), **EXACT)
    _, moved = step(drawn, case.model, x, y, loss)
    assert bool(torch.isfinite(moved.flat()).all()) and float(moved.norm()) > 0


def test_what_is_not_given_is_named():
    class OnlyExact(nng.Likelihood):
        square_root = Geometric.square_root

    case, loader, _ = made("mlp")
    with pytest.raises(nng.UnsupportedError, match="OnlyExact defines no sample"):
        nng.FIM_MonteCarlo(case.model, loader, likelihood=OnlyExact())
    Drawn = type("Drawn", (nng.Likelihood,), {"sample": Geometric.sample, "log_prob": Geometric.log_prob})
    with pytest.raises(nng.UnsupportedError, match="Drawn defines no square_root"):
        nng.FIM(case.model, loader, likelihood=Drawn())
