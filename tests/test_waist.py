"""The algebra of rows: a new member needs its rows and two slices, and operations work with any."""

from dataclasses import dataclass, replace

import cases
import pytest
import torch
from torch import Tensor

import nngeom as nng
from nngeom.core import costs, memory, pairs, parts, paths
from nngeom.core.centred import CentredJacobian
from nngeom.core.errors import StructureError
from nngeom.core.factored import FactoredJacobian, LookupJacobian
from nngeom.core.jacobian import FullJacobian, LayerJacobian, tensors
from nngeom.core.layout import Arrangement, Layout, Piece
from nngeom.core.statistic import Inputs, Moment
from nngeom.core.tied import SumJacobian, TiedJacobian
from nngeom.core.tile import Tile
from nngeom.core.totals import totals
from nngeom.core.weighted import WeightedJacobian
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.factors import factors, structure_of
from nngeom.pmat.placed import AppliedJacobian, PlacedJacobian
from nngeom.sweep.sweep import Sweep

MEMBERS = {"matrix", "examples", "cotangents", "shape", "dtype", "device", "to", "jvp", "vjp", "square"}
MEMBERS |= {"squared_norms", "gram", "rotate"}


@dataclass(frozen=True, eq=False)
class Scaled(LayerJacobian):
    """Rows times a number an example: a member as somebody would write it from outside."""

    inner: LayerJacobian
    by: Tensor  # [n]

    def matrix(self):
        return self.inner.matrix() * self.by[:, None, None, None]

    def examples(self, lo, hi):
        return Scaled(self.inner.examples(lo, hi), self.by[lo:hi])

    def cotangents(self, lo, hi):
        return Scaled(self.inner.cotangents(lo, hi), self.by)


def factored(k=3, n=4, t=2, s=1, o=3, i=5):
    return FactoredJacobian(torch.randn(n, t, s, i).double(), torch.randn(k, n, t, s, o).double())


def lookup(k=3, n=4, t=2, o=3, size=5):
    return LookupJacobian(torch.randint(size, (n, t)), torch.randn(k, n, t, 1, o).double(), size=size)


def placed():
    """Rows of two parameters of a span of three; no row reaches the last."""
    weight = Layout((Piece(("w",), 4, Arrangement.plain(1, 3, 5)),))
    bias = Layout((Piece(("b",), 0, Arrangement.plain(1, 4, 1)),))
    return PlacedJacobian(((weight, factored()), (bias, FullJacobian(torch.randn(3, 4, 1, 4, 1).double()))), 21)


def members():
    torch.manual_seed(0)
    plain = Arrangement.plain(1, 3, 5)
    weights = torch.randn(1, 3, 5).double()
    return {
        "full": FullJacobian(torch.randn(3, 4, 2, 3, 5).double()),
        "factored": factored(),
        "factored, one position": factored(t=1),
        "factored, groups": factored(s=2),
        "lookup": lookup(),
        "tied": TiedJacobian(((False, factored()), (True, factored(o=5, i=3)))),
        "sum": SumJacobian(((plain, factored()), (plain, FullJacobian(torch.randn(3, 4, 1, 3, 5).double())))),
        "weighted": WeightedJacobian(factored(), weights),
        "applied": AppliedJacobian(factored(), lambda m: (m * weights.to(m)).flip(-1)),
        "centred": CentredJacobian(factored(), torch.randn(3, 1, 3, 5).double()),
        "placed": placed(),
        "outside": Scaled(factored(), torch.rand(4).double()),
    }


def close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_rows_have_thirteen_members():
    assert {name for name in vars(LayerJacobian) if not name.startswith("_")} == MEMBERS
    assert LayerJacobian.__abstractmethods__ == {"matrix", "examples", "cotangents"}


@pytest.mark.parametrize("name", members())
def test_every_member_agrees_with_its_rows(name):
    j = members()[name]
    full = FullJacobian(j.matrix())
    assert (j.shape, j.dtype, j.device) == (full.shape, full.dtype, full.device)
    assert j.to(torch.float32).matrix().dtype == torch.float32
    close(j.examples(1, 3).matrix(), full.m[:, 1:3])
    close(j.cotangents(1, 3).matrix(), full.m[1:3])
    s, o, i = j.shape[2:]
    for lead in ((), (2,), (2, 3), (50,)):
        v, u = torch.randn(*lead, s, o, i).double(), torch.randn(*lead, *j.shape[:2]).double()
        close(j.jvp(v), full.jvp(v))
        close(j.vjp(u), full.vjp(u))
    close(totals(j), full.m.sum(1))
    close(j.square(), full.square())
    close(j.squared_norms(), full.squared_norms())
    ua, ug = torch.randn(s, i, i).double(), torch.randn(s, o, o).double()
    for bases in ((ua, ug), (ua, None), (None, ug), (None, None)):
        close(j.rotate(*bases).matrix(), full.rotate(*bases).matrix())
    assert all(isinstance(t, Tensor) for t in tensors(j)) and list(tensors(j))


@pytest.mark.parametrize("name", members())
def test_products_of_pairs_with_any_rows(name):
    j = members()[name]
    for other in members().values():
        if other.shape[2:] != j.shape[2:]:
            continue
        expected = torch.einsum("knsoi,lmsoi->knlm", j.matrix(), other.matrix())
        close(j.gram(other), expected)
        tile = Tile(j, other, by_examples=parts.has_positions(j))
        pairs.add(tile, j, other)
        close(tile.result(), expected)
    tile = Tile(j, j)
    pairs.add(tile, j, j)
    close(tile.result(), j.gram(j))


@pytest.mark.parametrize("name", members())
def test_parts_of_any_rows(name):
    j = members()[name]
    s, _, i = j.shape[2:]
    close(parts.features(j, 0, 1).matrix(), j.matrix()[:, :, :1] if s > 1 else j.matrix()[:, :, :, :1])
    close(parts.inputs(j, 1, i).matrix(), j.matrix()[..., 1:])
    out = torch.zeros(*j.shape[:4], i - 1).double()
    if parts.writes_columns(j) or not isinstance(j, FactoredJacobian):
        parts.write_columns(j, out, 1, i)
        close(out, j.matrix()[..., 1:])
    if parts.joins(j, j):
        close(parts.join(j, [j]).matrix(), torch.cat([j.matrix()] * 2, 1))
    else:
        with pytest.raises(nng.UnsupportedError, match="keeps batches apart"):
            parts.join(j, [j])


def value(t):
    t = t.value() if isinstance(t, Inputs) else t
    if isinstance(t, Moment):
        return (t.scale * t.x.T @ t.x).view(*t.lead, *[t.x.shape[1]] * 2)
    return t


def test_factors_are_asked_for_by_type():
    all_of = members()
    words = {"lookup": "lookup", "tied": "tied", "sum": "unlike uses"}
    for name, j in all_of.items():
        assert structure_of(j) == words.get(name, "kronecker" if "factored" in name else "exact")
    j = all_of["factored, one position"]
    found = factors(j, "expand", 100)
    close(value(found["a"])[0], j.a.flatten(0, 2).T @ j.a.flatten(0, 2))
    close(value(found["g"])[0], j.g.flatten(0, 3).T @ j.g.flatten(0, 3))
    with pytest.raises(StructureError, match="Scaled rows of 3 x 5 have no Kronecker structure"):
        factors(all_of["outside"], "expand", 100)
    narrow = Scaled(factored(o=1), torch.rand(4).double())
    rows = narrow.matrix().flatten(0, 1).flatten(1)
    close(factors(narrow, "reduce", 100)["a"][0], rows.T @ rows)


@pytest.fixture
def outside(monkeypatch):
    """All rows of a sweep as a member from outside; the numbers stay the same."""
    chunks = Sweep.chunks

    def wrapped(self, *args, **options):
        for chunk in chunks(self, *args, **options):
            jacobians = {lay: Scaled(j, torch.ones(j.shape[1], dtype=j.dtype)) for lay, j in chunk.jacobians.items()}
            yield replace(chunk, jacobians=jacobians)

    monkeypatch.setattr(Sweep, "chunks", wrapped)


KINDS = ["PMatDense", "PMatDiag", "PMatBlockDiag", "PMatQuasiDiag", "PMatLowRank"]


@pytest.mark.parametrize("name", ["mlp", "conv2d", "embedding"])
@pytest.mark.parametrize("budget", [None, 20_000])
def test_a_member_from_outside_under_every_representation(name, budget, request):
    case = cases.build(name, sizes=(3, 2))
    measured = lambda kind: nng.FIM(case.model, case.loader, getattr(nng, kind), memory_budget=budget).to_dense()
    expected = {kind: measured(kind) for kind in KINDS}
    kernels = {kind: nng.GramMatrix(case.model, case.loader, getattr(nng, kind)) for kind in ("FMatDense", "FMatDiag")}
    request.getfixturevalue("outside")
    for kind in KINDS:
        close(measured(kind), expected[kind])
    for kind, kernel in kernels.items():
        close(nng.GramMatrix(case.model, case.loader, getattr(nng, kind), memory_budget=budget).tensor, kernel.tensor)
    with pytest.raises(StructureError, match=r"Scaled rows of .* have no Kronecker structure"):
        nng.FIM(case.model, case.loader, nng.PMatKFAC)


def test_plans_change_with_sizes_and_fit_the_budget():
    torch.manual_seed(0)
    j = factored(k=2, n=6, t=20, o=3, i=4)
    few, many = torch.randn(1, 1, 3, 4).double(), torch.randn(40, 1, 3, 4).double()
    equation, rows = "kntso,ntsi,bsoi->bkn", (tuple(j.g.shape), tuple(j.a.shape))
    first = [paths.plan(equation, *rows, tuple(v.shape)).steps[0][0] for v in (few, many)]
    assert set(first[0]) != set(first[1])
    u = torch.randn(40, 2, 6).double()
    whole = j.jvp(many), j.vjp(u)
    torch.manual_seed(0)
    with memory.limit(800):
        close(j.jvp(many), whole[0])
        close(j.vjp(u), whole[1])


@pytest.mark.parametrize("way", [True, False])
def test_both_ways_give_the_same_numbers(monkeypatch, way):
    for rule in ("products_by_positions", "norms_by_positions", "squares_by_positions"):
        monkeypatch.setattr(costs, rule, lambda *sizes, **same: way)
    for j in (factored(t=3), lookup(t=3)):
        full = FullJacobian(j.matrix())
        close(j.gram(j), full.gram(full))
        close(j.squared_norms(), full.squared_norms())
        close(j.square(), full.square())


def test_a_parameter_in_two_blocks_is_an_error():
    lc = nng.LayerCollection.from_model(torch.nn.Linear(3, 2).double())
    blocks = {lc.span(names): DiagBlock(torch.ones(lc.span(names).sizes).double()) for names in (None, ["weight"])}
    with pytest.raises(StructureError, match=r"\['weight'\] are used in different ways"):
        nng.PMatDiag.of_blocks(lc, blocks, 1)
