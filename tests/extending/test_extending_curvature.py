"""A kind of curvature from outside: how a representation is kept in training, other than by its recipe."""

import io

import pytest
import reference
import torch
from cases import build
from root_of_squares import PMatRootOfSquares, RootOfSquares
from trained import EXACT, close, cross_entropy, step

import nngeom as nng
from nngeom.optim import NaturalGradient

MODELS = ("mlp", "conv2d", "transformer", "language-model", "reused")


def squares(case, x, y):
    return reference.loss_gradients(case.model, x, y, cross_entropy).square().mean(0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_a_step_divides_by_the_root(name, reduction):
    case = build(name, sizes=(8,))
    x, y = case.loader[0]
    opt = NaturalGradient(case.model, PMatRootOfSquares, **EXACT)
    for _ in range(2):
        root = squares(case, x, y).sqrt()
        gradient, moved = step(opt, case.model, x, y, reduction=reduction)
        close(moved, gradient.flat() / (root + 1e-2), 1e-7)
    assert [type(part) for part in opt.partition] == [RootOfSquares]


def test_squares_are_a_running_mean():
    case = build("mlp", sizes=(5, 6, 7))
    opt = NaturalGradient(case.model, PMatRootOfSquares, **{**EXACT, "statistics_decay": 0.5})
    mean, weight = 0.0, 0.0
    for x, y in case.loader:
        mean, weight = 0.5 * mean + 0.5 * squares(case, x, y), 0.5 * weight + 0.5
        gradient, moved = step(opt, case.model, x, y)
        close(moved, gradient.flat() / ((mean / weight).sqrt() + 1e-2))


def test_statistics_that_are_not_due_are_left_out():
    case = build("mlp", sizes=(5, 6))
    opt = NaturalGradient(case.model, PMatRootOfSquares, statistics_every=2, every=2, **EXACT)
    root = squares(case, *case.loader[0]).sqrt()
    for x, y in case.loader:
        gradient, moved = step(opt, case.model, x, y)
        close(moved, gradient.flat() / (root + 1e-2))


def test_beside_other_representations():
    case = build("mlp", sizes=(8,))
    x, y = case.loader[0]
    opt = NaturalGradient(case.model, nng.PMatMixed({"*bias": PMatRootOfSquares}, default=nng.PMatDiag), **EXACT)
    root = nng.PVector.from_flat(opt.collection, squares(case, x, y).sqrt())
    gradient, moved = step(opt, case.model, x, y)
    close(moved["0.bias"], gradient["0.bias"] / (root["0.bias"] + 1e-2))
    close(moved["0.weight"], gradient["0.weight"] / (root["0.weight"] ** 2 + 1e-2))


def test_under_a_likelihood():
    case = build("mlp", sizes=(8,))
    x, y = case.loader[0]
    opt = NaturalGradient(case.model, PMatRootOfSquares, fisher="exact", likelihood="categorical", **EXACT)
    root = reference.fisher(case.model, x).diagonal().sqrt()
    gradient, moved = step(opt, case.model, x, y)
    close(moved, gradient.flat() / (root + 1e-2))


def test_resuming_is_bitwise():
    case = build("mlp", sizes=(5, 6))
    make = lambda model: NaturalGradient(model, PMatRootOfSquares, lr=0.01, damping=1e-2)
    opt = make(case.model)
    for x, y in case.loader:
        step(opt, case.model, x, y)
    file = io.BytesIO()
    torch.save([opt.state_dict(), case.model.state_dict()], file)
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    again = build("mlp", sizes=(5, 6)).model
    again.load_state_dict(weights)
    second = make(again)
    second.load_state_dict(saved)
    for x, y in case.loader:
        step(opt, case.model, x, y)
        step(second, again, x, y)
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), again.parameters()))


def test_what_is_not_finite_is_skipped():
    case = build("mlp", sizes=(5, 6))
    opt = NaturalGradient(case.model, PMatRootOfSquares, **EXACT)
    step(opt, case.model, *case.loader[0])
    x, y = case.loader[1]
    with pytest.warns(nng.optim.SkippedStepWarning):
        _, moved = step(opt, case.model, x * float("nan"), y)
    assert float(moved.norm()) == 0
    gradient, moved = step(opt, case.model, x, y)
    assert bool(torch.isfinite(moved.flat()).all())


def test_it_is_measured_as_what_it_derives_from(tmp_path):
    case = build("conv2d")
    m = nng.FIM(case.model, case.loader, PMatRootOfSquares)
    close(m.to_dense(), nng.FIM(case.model, case.loader, nng.PMatDiag).to_dense())
    nng.save(m, tmp_path / "m")
    assert type(nng.load(tmp_path / "m")) is PMatRootOfSquares and type(m + m) is PMatRootOfSquares
    numbers = nng.explain(case.model, case.loader[0]).rows[0].numbers
    assert numbers["RootOfSquares"] == numbers["Diag"]
    hessian = nng.Hessian(case.model, case.loader, PMatRootOfSquares, loss="cross_entropy")
    close(hessian.diag(), reference.hessian(case.model, case.inputs, case.targets, cross_entropy).diagonal())
