"""The report of what the engine sees."""

import pytest
import torch
from cases import CASES, build

import nngeom as nng
from nngeom.core.registry import qualified


def test_explain_names_operations_structures_and_costs():
    c = build("decoder")
    report = nng.explain(c.model, c.loader[0])
    assert report["tokens.weight"].structure == "tied" and set(report["tokens.weight"].operations) == {
        "embedding",
        "linear",
    }
    assert report["positions.weight"].structure == "lookup"
    assert report["norm.weight"].structure == "exact" and report["norm.weight"].block == (3, 1, 2)
    assert "BlockDiag" in str(report) and "tokens.weight" in str(report)
    normed = nng.explain(build("weight-norm").model, build("weight-norm").loader[0])
    assert normed["0.parametrizations.weight.original1"].structure == "fallback" and "one backward pass" in str(normed)
    assert normed["2.weight"].structure == "kronecker"


TOLD = [nng.PMatDense, nng.PMatBlockDiag, nng.PMatDiag, nng.PMatQuasiDiag, nng.PMatKFAC, nng.PMatEKFAC]
TOLD += [nng.PMatKFAC.options(sua=True), nng.PMatEKFAC.options(sua=True, sharing="reduce")]
TOLD += [nng.PMatMixed({"*": nng.PMatMixed({"*": nng.PMatDiag})}), nng.PMatMixed({}, default=nng.PMatEKFAC)]


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("kind", range(len(TOLD)))
def test_the_numbers_are_those_held(name, kind):
    """The sum over blocks is what the measured matrix holds, or nothing is told and it cannot be measured."""
    c = build(name)
    report = nng.explain(c.model, c.loader[0], representations={"told": TOLD[kind]})
    together = {names: layout.names for layout in next(nng.rows(c.model, c.loader)).jacobians for names in layout.names}
    first = [row for row in report.rows if together.get(row.name, (row.name,))[0] == row.name]
    counts = [row.numbers["told"] for row in first]
    try:
        m = nng.FIM(c.model, c.loader, TOLD[kind])
    except nng.StructureError:
        assert None in counts
        return
    assert sum(counts) == sum(t.numel() for b in m.blocks.values() for t in b.tensors())


def test_representations_are_asked_and_the_leanest_comes_first():
    c = build("mlp")
    names = list(nng.explain(c.model, c.loader[0])["0.weight"].numbers)
    known = ["Eye", "Diag", "QuasiDiag", "KFAC", "EKFAC", "BlockDiag", "Dense"]
    assert [name for name in names if name in known] == known and "LowRank" not in names
    few = nng.explain(c.model, c.loader[0], representations=(nng.PMatLowRank, nng.PMatKFAC.options(sua=True)))
    assert list(few["0.weight"].numbers) == ["LowRank", "KFAC(sua=True)"] and few["0.weight"].numbers["LowRank"] is None
    assert "  -" in str(few) and list(nng.explain(c.model, c.loader[0], representations=nng.PMatEye)["0.bias"].numbers)


def test_what_is_no_representation_is_refused():
    c = build("mlp")
    with pytest.raises(nng.ArgumentTypeError, match="PMatKFAC"):
        nng.explain(c.model, c.loader[0], representations=("diag",))
    with pytest.raises(nng.ArgumentTypeError, match="PMatImplicit"):
        nng.explain(c.model, c.loader[0], representations=(nng.PMatImplicit,))
    mixtures = [nng.PMatMixed({"*": kind}) for kind in (nng.PMatDiag, nng.PMatEye, nng.PMatKFAC)]
    with pytest.raises(nng.ArgumentError, match=r"two representations .* pass a dict"):
        nng.explain(c.model, c.loader[0], representations=mixtures)


def test_a_recipe_of_ones_own_is_not_spoken_for():
    class PMatTwice(nng.PMatDiag):
        @classmethod
        def recipe(cls, selection):
            return (yield from super().recipe(selection))

    class PMatThrice(PMatTwice):
        @classmethod
        def entries_of(cls, layout, rows, selection):
            return 3 * layout.numel

    c = build("mlp")
    row = nng.explain(c.model, c.loader[0], representations=(PMatTwice, PMatThrice))["0.bias"]
    assert row.numbers == {"Twice": None, "Thrice": 3 * nng.explain(c.model, c.loader[0])["0.bias"].numbers["Diag"]}
    apart = nng.PMatMixed({"*bias": nng.PMatDiag}, default=nng.PMatKFAC)
    assert nng.explain(c.model, c.loader[0], representations=apart)["0.bias"].numbers == {"Mixed": None}


def test_unused_parameters_are_reported():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    report = nng.explain(Model(), torch.randn(3, 2))
    assert report["unused.weight"].structure == "unused"


def test_a_class_defined_anew_takes_the_place_of_the_first():
    """As when a notebook cell runs twice, or two modules have a class of one name."""

    def named(n):
        class PMatNamed(nng.PMatDiag):
            @classmethod
            def recipe(cls, selection):
                return (yield from super().recipe(selection))

            @classmethod
            def entries_of(cls, layout, rows, selection, **options):
                return n * layout.numel

        return PMatNamed

    first, last = named(2), named(3)
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    told = nng.explain(model, x)["weight"].numbers
    assert first is not last and 3 * told["Diag"] in (told.get("Named"), told.get(qualified(last)))
    with pytest.raises(nng.ArgumentError, match="both called"):
        nng.explain(model, x, representations=(last, last, last))
