"""A preset from outside: its step, its options, its state."""

import io

import pytest
import torch
from cases import build
from matrices_only import MatricesOnly
from torch import nn
from trained import EXACT, close, cross_entropy, step

import nngeom as nng

MODELS = ("mlp", "conv2d", "transformer", "language-model")


def mixture(model, **options):
    collection = nng.LayerCollection.from_model(model)
    vectors = [name for name, p in model.named_parameters() if p.ndim < 2 and name in collection.names]
    return nng.PMatMixed(dict.fromkeys(vectors, nng.PMatDiag), default=nng.PMatKFAC.options(**options))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_step_is_the_solve(name, sharing):
    case = build(name, sizes=(8,))
    x, y = case.loader[0]
    opt = MatricesOnly(case.model, 1.0, sharing=sharing, **{k: v for k, v in EXACT.items() if k != "lr"})
    matrix = nng.EmpiricalFIM(case.model, (x, y), mixture(case.model, sharing=sharing), loss="cross_entropy")
    gradient, moved = step(opt, case.model, x, y)
    close(moved, matrix.solve(gradient, 1e-2))


def test_under_a_likelihood_and_on_some_parameters():
    case = build("mlp", sizes=(8,))
    x, y = case.loader[0]
    opt = MatricesOnly(case.model, fisher="exact", likelihood="categorical", **EXACT)
    matrix = nng.FIM(case.model, (x, y), mixture(case.model))
    gradient, moved = step(opt, case.model, x, y)
    close(moved, matrix.solve(gradient, 1e-2))
    some = nng.LayerCollection.from_model(case.model, include="2")
    _, moved = step(MatricesOnly(case.model, layer_collection=some, **EXACT), case.model, x, y)
    assert float(moved["0.weight"].norm()) == 0 < float(moved["2.weight"].norm())
    bare = nn.Sequential(nn.Linear(4, 3, bias=False)).double()  # no vectors at all
    step(MatricesOnly(bare, **EXACT), bare, torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,)))


def test_it_descends_and_resumes_bitwise():
    case = build("mlp", sizes=(8, 8))
    loss = lambda: cross_entropy(case.model(case.inputs), case.targets).mean().item()
    opt, before = MatricesOnly(case.model, 0.02, damping=0.1, every=3, statistics_every=1), loss()
    for turn in range(6):
        step(opt, case.model, *case.loader[turn % 2])
    file = io.BytesIO()
    torch.save([opt.state_dict(), case.model.state_dict()], file)
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    again = build("mlp", sizes=(8, 8)).model
    again.load_state_dict(weights)
    second = MatricesOnly(again, 0.02, damping=0.1, every=3, statistics_every=1)
    second.load_state_dict(saved)
    for turn in range(4):
        step(opt, case.model, *case.loader[turn % 2])
        step(second, again, *case.loader[turn % 2])
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), again.parameters()))
    assert loss() < before


def test_errors_are_those_of_natural_gradients():
    case = build("mlp")
    with pytest.raises(nng.ArgumentError, match="sharing is 'none'"):
        step(MatricesOnly(case.model, sharing="none"), case.model, *case.loader[0])
    with pytest.raises(TypeError, match="speed"):
        MatricesOnly(case.model, speed=3)
    with pytest.raises(nng.ArgumentError, match="before anything was observed"):
        opt = MatricesOnly(case.model)
        cross_entropy(case.model(case.inputs), case.targets).mean().backward()
        opt.step()
