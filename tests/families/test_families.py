"""Composed cases: equal to autograd, or a documented error. Some hundreds here, ten thousand behind the slow marker."""

import random

import pytest

from .blocks import BLOCKS
from .bodies import BODIES
from .case import AXES, EXACT, FAILURES, VOID, Recipe, draw, run, shortened
from .measures import MEASURES
from .noises import NOISES
from .placings import SEPARATE

SOME, MANY, CHUNK = 300, 10_000, 100
SHOWN = 3  # failures of a chunk that are shortened and printed


def hold(seeds: range, slow: bool = False) -> None:
    """Run the recipes of seeds; fail with the shortest recipes that still do."""
    recipes = [draw(seed, slow) for seed in seeds]
    bad = [recipe for recipe in recipes if run(recipe).kind in FAILURES]
    lines = []
    for recipe in bad[:SHOWN]:
        short, outcome = shortened(recipe)
        lines.append(f"{outcome.kind}: python tests/families --recipe {str(short)!r}   # {outcome.text}")
    assert not bad, "\n".join([f"{len(bad)} of {len(recipes)} compositions fail, for example", *lines])


@pytest.mark.parametrize("first", range(0, SOME, CHUNK))
def test_compositions(first):
    hold(range(first, first + CHUNK))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SOME, SOME + MANY, CHUNK))
def test_many_compositions(first):
    hold(range(first, first + CHUNK), slow=True)


def outcome_of(**members) -> str:
    outcome = run(Recipe(**members))
    assert outcome.kind not in FAILURES, f"{Recipe(**members)}: {outcome}"
    return outcome.kind


ORDINARY = [name for name in BODIES if not name.startswith("pool")] + ["pool by index_add", "pool by scatter_add"]
KNOWN = [name for name in BLOCKS if name not in ("force", "small gradients")]


@pytest.mark.parametrize("body", ORDINARY)
@pytest.mark.parametrize("measure", ["Jacobian", "FIM Diag", "FIM EKFAC trace", "EmpiricalFIM Dense", "GramMatrix"])
def test_usual_models_are_not_refused(body, measure):
    assert outcome_of(body=body, measure=measure, n=4) == EXACT


@pytest.mark.parametrize("placing", ["none", "front"])  # rows, and sequences: a view of rows
@pytest.mark.parametrize("block", KNOWN)
def test_usual_and_unusual_blocks_are_not_refused(block, placing):
    for measure in ("Jacobian", "FIM Dense", "GramMatrix Diag"):
        assert outcome_of(block=block, placing=placing, measure=measure, n=4, moment="several batches") == EXACT


@pytest.mark.parametrize("placing", ["none", "sort", "gather", "flip", "masked", "front", "index_copy"])
def test_examples_moved_and_put_back_are_not_refused(placing):
    for measure in ("Jacobian", "FIM Diag"):
        assert outcome_of(placing=placing, measure=measure, n=5, moment="in order at first") == EXACT


@pytest.mark.parametrize("noise", [name for name in NOISES if name != "none"])
def test_random_or_stateful_passes_are_a_mode_error(noise):
    """Or are exact, where the draw does not matter; and leave everything as it was."""
    wrong = []
    for measure in ("Jacobian", "FIM Diag", "EmpiricalFIM Dense", "GramMatrix", "Hessian v", "trace penalty"):
        for moment in ("usual", "several batches"):
            outcome = run(Recipe(noise=noise, measure=measure, moment=moment, n=4))
            if outcome.kind not in (EXACT, VOID) and not outcome.text.startswith("ModeError"):
                wrong.append(f"{measure}, {moment}: {outcome.kind} {outcome.text}")
    assert not wrong, "\n".join(wrong)


MENDED = [  # drawn once, wrong once
    "placing=topk moment=trained wrapper=parameter_hooks n=5 seed=1",
    "body=recurrent placing=topk moment=trained wrapper=parameter_hooks n=8",
    *(f"wrapper=scripted noise={noise} n=3" for noise in ("gumbel_softmax", "randn_like", "rand", "bernoulli")),
]


@pytest.mark.parametrize("recipe", MENDED)
def test_what_was_wrong_once(recipe):
    outcome = run(Recipe.parse(recipe))
    assert outcome.kind not in FAILURES, outcome


def test_a_recipe_is_what_its_text_says():
    rng = random.Random(0)
    for seed in rng.sample(range(MANY), 200):
        recipe = draw(seed, slow=True)
        assert Recipe.parse(str(recipe)) == recipe


def test_every_member_runs():
    """No member is void by itself: a model that does not run shows nothing."""
    for axis, members in AXES.items():
        for name in members:
            if name.startswith("compiled") or (axis, name) == ("moment", "inference inputs"):
                continue
            assert run(Recipe(**{axis: name})).kind != VOID, (axis, name)


def test_failures_are_shortened(monkeypatch):
    """A wrong library is found, and the recipe that is printed names what is needed only."""
    real = MEASURES["Jacobian"]

    def wrong(w, loader, truth, generator, **options):
        got, want = real(w, loader, truth, generator, **options)
        return (2 * got if w.model.placing is SEPARATE["flip"] else got), want

    monkeypatch.setitem(MEASURES, "Jacobian", wrong)
    recipe = Recipe(body="mlp", block="mlp", placing="flip", moment="several batches", n=5, budget=20_000)
    short, outcome = shortened(recipe)
    assert (short.body, short.block, short.placing, short.moment, short.n) == ("vector", "linear", "flip", "usual", 1)
    assert outcome.kind in FAILURES
