"""One composition: drawn from a seed, run, judged, and shortened where it fails."""

from __future__ import annotations

import dataclasses
import itertools
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

import nngeom as nng

from .blocks import BLOCKS
from .bodies import BODIES
from .measures import FIRST, MEASURES, SECOND
from .moments import MOMENTS
from .net import OUTPUTS, Net, Truth, randomised
from .noises import NOISES
from .placings import PLACINGS
from .state import same, state_of
from .wrappers import NO_SECOND, SLOW, WRAPPERS, Wrapped

AXES: dict[str, dict[str, Any]] = {
    "body": BODIES,
    "block": BLOCKS,
    "placing": PLACINGS,
    "moment": MOMENTS,
    "wrapper": WRAPPERS,
    "measure": MEASURES,
    "noise": NOISES,
}
SIMPLE = {"placing": 0.35, "moment": 0.35, "wrapper": 0.5, "noise": 0.92}  # share of cases with the simplest member
BUDGETS = (None, 1, 2_000, 20_000)
EXACT, REFUSED, VOID, WRONG, CRASH, TOUCHED = "exact", "refused", "void", "WRONG", "CRASH", "TOUCHED"
FAILURES = (WRONG, CRASH, TOUCHED)


@dataclass(frozen=True)
class Recipe:
    """What is composed. Defaults are the simplest member of each axis; ``str`` names what differs from them."""

    body: str = "vector"
    block: str = "linear"
    placing: str = "none"
    moment: str = "usual"
    wrapper: str = "plain"
    measure: str = "Jacobian"
    noise: str = "none"
    n: int = 3
    budget: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{f.name}={str(getattr(self, f.name)).replace(' ', '_')}" for f in changed) or "seed=0"

    @staticmethod
    def parse(text: str) -> Recipe:
        """The recipe that was printed."""
        entries: dict[str, Any] = {}
        for key, _, value in (word.partition("=") for word in text.split()):
            entries[key] = value.replace("_", " ") if key in AXES else None if value == "None" else int(value)
            if key in AXES and entries[key] not in AXES[key]:  # names with an underscore of their own
                entries[key] = next(name for name in AXES[key] if name.replace(" ", "_") == value)
        return Recipe(**entries)


@dataclass(frozen=True)
class Outcome:
    """How a recipe ended, and the words to it."""

    kind: str
    text: str = ""


def draw(seed: int, slow: bool = False, **fixed: str) -> Recipe:
    """The recipe of a seed. Axes often stay at their simplest: one member's refusal would hide another's failure."""
    rng = random.Random(seed)
    chosen: dict[str, Any] = {}
    for axis, members in AXES.items():
        names = [name for name in members if slow or name not in SLOW]
        simple = rng.random() < SIMPLE.get(axis, 0.0)
        chosen[axis] = fixed.get(axis, getattr(Recipe, axis) if simple else rng.choice(names))
    return Recipe(**chosen, n=rng.randint(1, 12), budget=rng.choice(BUDGETS), seed=seed)


def build(recipe: Recipe) -> Net:
    """The model of a recipe."""
    torch.manual_seed(recipe.seed)
    body, block = BODIES[recipe.body][0](), BLOCKS[recipe.block]()
    net = randomised(Net(body, block, PLACINGS[recipe.placing]), recipe.seed)
    net.gate.data.fill_(0.8)
    net.noise = NOISES[recipe.noise]()
    return net


def batches_of(recipe: Recipe) -> Any:
    """``draw(n)``: a batch ``(x, y)``."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    make = BODIES[recipe.body][1]
    return lambda n: (make(n, generator), torch.randint(0, OUTPUTS, (n,), generator=generator))


def run(recipe: Recipe) -> Outcome:
    """The worst outcome of all moments of a recipe."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = WRAPPERS[recipe.wrapper](net := build(recipe))
        found = [Outcome(EXACT)]
        moments = MOMENTS[recipe.moment](net, batches_of(recipe), recipe.n)
        for number in itertools.count(1):
            try:
                batches = next(moments, None)
            except Exception as error:  # of a training step between two measurements
                return Outcome(VOID, f"the model itself does not run: {error}")
            if batches is None:
                break
            found.append(measured(recipe, wrapped, batches))
            if found[-1].kind in FAILURES:
                return Outcome(found[-1].kind, f"at measurement {number}: {found[-1].text}")
    return next((outcome for outcome in found if outcome.kind != EXACT), found[-1])


def measured(recipe: Recipe, wrapped: Wrapped, batches: list[tuple[Tensor, Tensor]]) -> Outcome:
    """One measurement of one list of batches."""
    second = recipe.measure in SECOND
    if second and NO_SECOND & {recipe.wrapper, recipe.moment, recipe.placing, recipe.noise}:
        return Outcome(VOID, "no second derivatives to compare with")
    batches = batches[:1] if recipe.measure in FIRST else batches
    options = {} if recipe.measure == "trace penalty" else {"memory_budget": recipe.budget}
    generator = torch.Generator().manual_seed(recipe.seed + 2)
    truth = Truth(wrapped.call, wrapped.model, batches)
    try:
        reached, certain = truth.reached, recipe.noise == "none" or truth.certain
    except Exception as error:
        return Outcome(VOID, f"the model itself does not run: {error}")
    before = state_of(wrapped.model)
    try:
        got, want = MEASURES[recipe.measure](wrapped, batches, truth, generator, **options)
    except nng.NNGeomError as error:
        public = next(kind for kind in type(error).__mro__ if hasattr(nng, kind.__name__))
        outcome = Outcome(REFUSED, f"{public.__name__}: {error}")
    except Exception as error:
        outcome = Outcome(CRASH, f"{type(error).__name__}: {error}".split("\n")[0][:300])
    else:
        off = distance(got.detach().double(), want.detach().double(), [p.numel() for p in truth.parameters])
        allowed = max(wrapped.tolerance, 1e-5) if second else wrapped.tolerance
        outcome = Outcome(EXACT if off <= allowed else WRONG, f"relative error {off:.2g}")
        if not certain:
            outcome = Outcome(WRONG, "numbers of a forward pass that is not the same twice")
        elif second and outcome.kind == WRONG and not smooth(truth, recipe.seed + 2):
            outcome = Outcome(VOID, "no second derivatives here: a kink")
        if not reached:
            outcome = Outcome(WRONG, "numbers, though no output depends on any parameter of the model")
    changed = [name for name, value in state_of(wrapped.model).items() if not same(value, before.get(name))]
    if changed and outcome.kind != CRASH:
        words = f"measuring changed {', '.join(changed)}"
        return Outcome(WRONG, f"{outcome.text}; {words}") if outcome.kind == WRONG else Outcome(TOUCHED, words)
    return outcome


def smooth(truth: Truth, seed: int) -> bool:
    """Whether gradients have a derivative where the model stands, as far as random directions tell: the first three
    are those that were compared.
    """
    d, generator = sum(p.numel() for p in truth.parameters), torch.Generator().manual_seed(seed)
    directions = torch.cat([torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (3, 4)])
    return all(truth.smooth(name, v) for name in ("loss_gradient", "trace") for v in directions)


def distance(got: Tensor, want: Tensor, sizes: list[int]) -> float:
    """Largest relative error of a parameter, where the last axis holds parameters; 1e-9 of the whole is rounding."""
    if got.shape != want.shape:
        return float("inf")
    split = got.ndim > 0 and sum(sizes) == got.shape[-1]
    pairs = zip(got.split(sizes, -1), want.split(sizes, -1)) if split else [(got, want)]
    floor = 1e-3 * want.norm() + 1e-12  # relative errors below 1e-6 of this are 1e-9 of the whole
    worst = max(float((a - b).norm() / (b.norm() + floor)) for a, b in pairs)
    return worst if worst == worst else float("inf")


def shortened(recipe: Recipe) -> tuple[Recipe, Outcome]:
    """The recipe with every axis at its simplest that can be, while it still fails."""
    outcome = run(recipe)
    for field in fields(Recipe):
        for value in simpler(field.name, getattr(recipe, field.name)):
            trial = dataclasses.replace(recipe, **{field.name: value})
            found = run(trial)
            if found.kind in FAILURES:
                recipe, outcome = trial, found
                break
    return recipe, outcome


def simpler(axis: str, value: Any) -> Iterator[Any]:
    """Values to try instead, the simplest first."""
    candidates = {"n": (1, 2, 3, 4, 6, 8), "seed": (0, 1)}.get(axis, (getattr(Recipe, axis),))
    yield from (c for c in candidates if c != value and (axis != "n" or c < value))
