"""Keyword arguments that nobody has: the error lists what there is, and guesses what was meant."""

import inspect

import pytest
from cases import build

import nngeom as nng

MEASURES = [nng.FIM, nng.FIM_MonteCarlo, nng.EmpiricalFIM, nng.GGN, nng.Hessian, nng.GradientCovariance]


def refused(measure, **keywords) -> str:
    """The text of the error."""
    case = build("mlp")
    needed = {"loss": "cross_entropy"} if "loss" in inspect.signature(measure).parameters else {}
    with pytest.raises(nng.ArgumentError) as error:
        measure(case.model, case.loader, **(needed | keywords))
    return str(error.value)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda f: f.__name__)
def test_arguments_of_the_measure_are_listed(measure):
    told = refused(measure, nothing_like_it=1)
    listed = [p.name for p in inspect.signature(measure).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert told.startswith(f"{measure.__name__} has no argument 'nothing_like_it'")
    assert f"{measure.__name__} takes {', '.join(listed)};" in told and "did you mean" not in told


@pytest.mark.parametrize(
    "keywords, meant",
    [
        ({"loss": "mse"}, 'likelihood= says what the outputs are ("gaussian" for squared errors)'),
        ({"variant": "regression"}, '"regression" is "gaussian"'),
        ({"trials": 2}, "samples= of FIM_MonteCarlo"),
        ({"regul": 1e-3}, r"M.solve(v, damping=1e-3)"),
        ({"n_output": 3}, "leave it out"),
        ({"device": "cpu"}, "move the model"),
        ({"likelihod": "gaussian"}, "did you mean likelihood=?"),
        ({"sharin": "reduce"}, "did you mean sharing=?"),
        ({"sharing": "reduce", "layer_colection": None}, "did you mean layer_collection=?"),
    ],
    ids=str,
)
def test_what_was_meant(keywords, meant):
    assert meant in refused(nng.FIM, **keywords)


def test_losses_are_no_likelihoods():
    assert "pass loss=" in refused(nng.GGN, likelihood="gaussian")


def test_options_are_those_of_the_representation():
    assert "PMatKFAC takes sharing, sua, block_limit" in refused(nng.FIM, wrong=1)
    assert "PMatImplicit takes none" in refused(nng.FIM, representation=nng.PMatImplicit, sharing="reduce")
    assert "belong inside the representation" in refused(
        nng.FIM, representation=nng.PMatMixed({"*": nng.PMatKFAC}), sharing="reduce"
    )
    assert "NNGeometry's variant=" in refused(nng.FIM, representation=nng.PMatMixed({"*": nng.PMatKFAC}), variant="x")
