"""A statistic says what it is: no name of one carries meaning, whoever adds it up."""

import itertools

import pytest
import torch
from cases import build
from torch.nn import functional as F

import nngeom as nng
from nngeom.core.statistic import Inputs, Moment, Stacked, Sums
from nngeom.optim import NaturalGradient
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.factors import factors
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.pmat import PMat
from nngeom.sweep.sweep import Chunk

f64 = torch.float64
NAMES = ["d", "a", "g", "gamma", "c", "b", "a0", "g0", "inputs", ""]


def diagonal_named(first, second):
    """The diagonal, beside a statistic that is not used, under any names."""

    class Named(PMat):
        @classmethod
        def recipe(cls, selection):
            def statistic(chunk):
                squares = {layout: j.square() for layout, j in chunk.jacobians.items()}
                return {layout: {first: d, second: d} for layout, d in squares.items()}

            means = yield statistic
            return {layout: DiagBlock(t[first]) for layout, t in means.items()}

    return Named


def step_of(representation, case, reduction="mean", cuts=1, **options):
    """What one step subtracts from the parameters."""
    opt = NaturalGradient(case.model, representation, lr=1.0, momentum=0.0, kl_clip=None, damping=1e-2, **options)
    before = nng.PVector.from_model(case.model)
    x, y = case.loader[0]
    for part in range(cuts):
        with opt.observe(reduction):
            F.cross_entropy(case.model(x[part::cuts]), y[part::cuts], reduction="sum").div(
                len(x) if reduction == "mean" else 1
            ).backward()
    opt.step()
    after = nng.PVector.from_model(case.model)
    before.copy_to(case.model)
    for p in case.model.parameters():
        p.grad = None
    return (before - after).flat()


@pytest.mark.parametrize("first, second", list(itertools.permutations(NAMES, 2))[::3])
def test_names_of_statistics_mean_nothing(first, second):
    case = build("mlp", sizes=(8,))
    named = diagonal_named(first, second)
    for reduction, cuts in (("mean", 1), ("mean", 2), ("sum", 1)):
        torch.testing.assert_close(
            step_of(named, case, reduction, cuts), step_of(nng.PMatDiag, case, reduction, cuts), rtol=1e-12, atol=1e-14
        )
    for budget in (None, 2000):
        measured = nng.FIM(case.model, case.loader, named, memory_budget=budget)
        torch.testing.assert_close(measured.diag().flat(), nng.FIM(case.model, case.loader, nng.PMatDiag).diag().flat())


class PMatOwnFactors(PMat):
    """KFAC written from outside, its factors under names of its own."""

    @classmethod
    def recipe(cls, selection):
        def statistic(chunk):
            sums = {layout: factors(j, "expand", 10**6) for layout, j in chunk.jacobians.items()}
            return {layout: {"gauche": s["a"], "droite": s["g"]} for layout, s in sums.items()}

        means = yield statistic
        return {layout: KroneckerBlock(t["gauche"], t["droite"]) for layout, t in means.items()}


@pytest.mark.parametrize("name", ["mlp", "conv2d"])
def test_statistics_of_inputs_are_marked_by_their_type(name):
    case = build(name, sizes=(6,))
    for reduction, cuts in (("mean", 1), ("mean", 2), ("sum", 1)):
        torch.testing.assert_close(
            step_of(PMatOwnFactors, case, reduction, cuts),
            step_of(nng.PMatKFAC, case, reduction, cuts),
            rtol=1e-12,
            atol=1e-14,
        )
    for budget in (None, 6000):
        for measured in (
            nng.FIM,
            lambda *a, **k: nng.FIM_MonteCarlo(*a, samples=3, generator=torch.Generator().manual_seed(1), **k),
        ):
            mine, kfac = (
                measured(case.model, case.loader, kind, memory_budget=budget) for kind in (PMatOwnFactors, nng.PMatKFAC)
            )
            torch.testing.assert_close(mine.to_dense(), kfac.to_dense())
    g = lambda: torch.Generator().manual_seed(2)
    mine, kfac = (
        nng.FIM(case.model, case.loader, kind, estimator="rademacher", samples=3, generator=g())
        for kind in (PMatOwnFactors, nng.PMatKFAC)
    )
    torch.testing.assert_close(mine.matrix.to_dense(), kfac.matrix.to_dense())
    for one, other in zip(mine.draws, kfac.draws):
        torch.testing.assert_close(one.to_dense(), other.to_dense())


def chunk(examples, first):
    return Chunk({}, examples, 0, (0 if first else 1, 2))


def added(*parts):
    """Sums after ``(statistics of block "b", examples, first)`` each."""
    sums = Sums()
    for named, examples, first in parts:
        sums.add(lambda _, named=named: {"b": named}, chunk(examples, first))
    return sums


def test_inputs_are_counted_once_a_batch():
    x, y = torch.arange(4.0, dtype=f64), torch.ones(2, 3, dtype=f64)
    batch = lambda first: (
        {
            "of inputs": Inputs(x.clone()),
            "lazy": Inputs(lambda: 2 * x),
            "moment": Inputs(Moment(y)),
            "rows": Stacked([y]),
            "sum": x.clone(),
        },
        5,
        first,
    )
    sums = added(batch(True), batch(False), batch(True), batch(False), batch(False))
    assert sums.count == 10 and sums.inputs == {("b", "of inputs"), ("b", "lazy"), ("b", "moment")}
    named = sums.sums["b"]
    assert (
        torch.equal(named["of inputs"], 2 * x)
        and torch.equal(named["lazy"], 4 * x)
        and torch.equal(named["sum"], 5 * x)
    )
    assert torch.equal(named["moment"], 2 * y.T @ y) and len(named["rows"].parts) == 5
    means = sums.mean()["b"]
    assert torch.equal(means["of inputs"], x / 5) and torch.equal(means["sum"], x / 2)


def test_inputs_of_later_cotangents_are_not_even_computed():
    def never():
        raise AssertionError("asked for inputs a second time")

    added(({"a": Inputs(torch.ones(2))}, 3, True), ({"a": Inputs(never)}, 3, False))


def test_merging_keeps_what_is_of_inputs_and_changes_neither_side():
    x = torch.arange(3.0, dtype=f64)
    parts = lambda: [({"a": Inputs(k * x), "g": k * x, "r": Stacked([k * x[None]])}, k, True) for k in (1, 2, 3)]
    sides = [added(p) for p in parts()]
    merged, whole = Sums().merge(sides), added(*parts())
    assert merged.count == 6 and merged.inputs == whole.inputs == {("b", "a")}
    for name, t in whole.mean()["b"].items():
        assert torch.equal(t, merged.mean()["b"][name])
    assert all(
        torch.equal(side.sums["b"]["g"], k * x) and len(side.sums["b"]["r"].parts) == 1
        for k, side in zip((1, 2, 3), sides)
    )


def test_other_cotangents_of_the_same_examples_share_inputs():
    x = torch.arange(3.0, dtype=f64)
    first, second = Sums(), Sums()
    for _ in range(2):
        first.add(lambda _: {"b": {"a": Inputs(x), "g": x}}, chunk(5, True))
        second.add(lambda _: {"b": {"a": Inputs(x), "g": 3 * x}}, chunk(5, False))
    second.share_inputs(first)
    assert (
        second.count == 10
        and torch.equal(second.mean()["b"]["a"], x / 5)
        and torch.equal(second.mean()["b"]["g"], 3 * x / 5)
    )
    whole = Sums().merge([first, second]).mean()["b"]
    assert torch.equal(whole["a"], x / 5) and torch.equal(whole["g"], 2 * x / 5)


def test_one_tensor_as_two_statistics_is_added_up_as_two():
    x = torch.ones(3, dtype=f64)
    sums = Sums()
    for _ in range(3):
        t = x.clone()
        sums.add(lambda _, t=t: {"b": {"d": t, "e": t}, "c": {"d": t.view(3, 1)}}, chunk(1, True))
    assert (
        torch.equal(sums.sums["b"]["d"], 3 * x)
        and torch.equal(sums.sums["b"]["e"], 3 * x)
        and torch.equal(sums.sums["c"]["d"], 3 * x[:, None])
    )


def test_a_constant_handed_over_in_every_chunk_is_added_up():
    x, sums = torch.ones(3, dtype=f64), Sums()
    for _ in range(4):
        sums.add(lambda _: {"b": {"one": x}}, chunk(1, True))
    assert torch.equal(sums.sums["b"]["one"], 4 * torch.ones(3, dtype=f64)) and torch.equal(x, torch.ones(3, dtype=f64))
