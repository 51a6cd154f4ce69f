"""Products of rows with vectors over all parameters where they lie, and when products are taken by rows."""

import pytest
import reference
import torch
from cases import CASES, build
from torch import nn

import nngeom as nng
from nngeom.core import flat_products
from nngeom.core.factored import FactoredJacobian
from nngeom.core.jacobian import FullJacobian
from nngeom.core.layout import Arrangement, Layout, Piece

f64 = torch.float64


def layout(s, o, i, order=(0, 1, 2), bias=True):
    """A weight, its view turned by ``order``, behind three other numbers, and a bias after a gap."""
    sizes = s, o, i
    view = tuple(sizes[order.index(j)] for j in range(3))
    pieces = [Piece(("w",), 3, Arrangement(view, order, sizes))]
    if bias:
        pieces.append(Piece(("b",), 5 + s * o * i, Arrangement.plain(s, o, 1)))
    return Layout(tuple(pieces))


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("place", [(1, 4, 5), (2, 4, 5), (1, 4, 5, (0, 2, 1)), (1, 4, 5, (0, 1, 2), False)])
@pytest.mark.parametrize("dtypes", [(f64, f64), (torch.float32, f64)], ids=str)
def test_rows_times_vectors_where_they_lie(t, place, dtypes):
    of_rows, of_vectors = dtypes
    torch.manual_seed(0)
    block = layout(*place)
    s, o, i = block.sizes
    a, g = torch.randn(6, t, s, i, dtype=of_rows), torch.randn(3, 6, t, s, o, dtype=of_rows)
    v, u = torch.randn(2, 40 + s * o * i, dtype=of_vectors), torch.randn(2, 3, 6, dtype=of_vectors)
    rows = torch.einsum("kntso,ntsi->knsoi", g, a).to(of_vectors)
    expected = torch.einsum("knsoi,bsoi->bkn", rows, block.gather(v))
    tol = 1e-12 if of_rows == f64 else 1e-5
    for j in (FactoredJacobian(a, g), FullJacobian(rows.to(of_rows))):
        torch.testing.assert_close(flat_products.times(block, j, v), expected, rtol=tol, atol=tol)
        found, scattered = v.clone(), torch.zeros_like(v)
        flat_products.add_transposed_(found, block, j, u)
        block.scatter_(scattered, torch.einsum("knsoi,bkn->bsoi", rows, u))
        torch.testing.assert_close(found, v + scattered, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", CASES)
def test_products_by_rows(name):
    case = build(name)
    m = nng.FIM_MonteCarlo(case.model, case.loader, nng.PMatImplicit, generator=torch.Generator().manual_seed(3))
    v = torch.randn(4, m.shape[0], dtype=f64)
    v[1] = 0
    with m.run.within():
        found, count = m._by_rows(v)
    singly = torch.stack([m.product(row) for row in v])
    torch.testing.assert_close(found / count, singly, rtol=1e-8, atol=1e-8 * float(singly.abs().max()))
    torch.testing.assert_close(m.product(v), singly, rtol=1e-8, atol=1e-8 * float(singly.abs().max()))


class Counted(nn.Module):
    """A net with so many outputs."""

    def __init__(self, outputs):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6, dtype=f64), nn.Linear(6, outputs, dtype=f64)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("outputs, vectors, rows", [(3, 2, True), (3, 8, True), (9, 4, False), (9, 6, True)])
def test_rows_where_they_are_few(outputs, vectors, rows, monkeypatch):
    torch.manual_seed(0)
    model, data = Counted(outputs), [torch.randn(5, 4, dtype=f64), torch.randn(2, 4, dtype=f64)]
    m = nng.FIM(model, data, nng.PMatImplicit)
    assert m.columns == outputs - 1
    taken = []
    kind = type(m)
    for name in ("_by_rows", "_at_once"):
        before = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, x, name=name, f=before: taken.append(name) or f(self, x))
    v = torch.randn(vectors, m.shape[0], dtype=f64)
    expected = v @ reference.fisher(model, torch.cat(data))
    torch.testing.assert_close(m.product(v), expected)
    assert taken == ["_by_rows" if rows else "_at_once"]


def test_what_is_not_known_to_have_few_rows():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, dtype=f64))

        def forward(self, x):
            return (x @ self.w.pow(2)).cos()

    model, x = Bare(), torch.randn(5, 4, dtype=f64)
    assert nng.FIM(model, [x], nng.PMatImplicit).columns is None
    assert nng.FIM(Counted(3), [x], nng.PMatImplicit, check=False).columns is None
    images = nn.Sequential(nn.Conv1d(4, 2, 1), nn.Flatten(), nn.Linear(10, 3)).double()
    assert nng.FIM(images, [torch.randn(3, 4, 5, dtype=f64)], nng.PMatImplicit).columns == 4  # two, counted twice
