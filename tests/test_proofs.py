"""What is proved of a model once holds for passes that did the same, and for no others."""

import pytest
import reference
import torch
from cases import Unseen
from torch import nn

import nngeom as nng
from nngeom.pullback.proofs import forget

f64 = torch.float64


class Counting(nn.Module):
    """Two layers; ``hidden`` adds a use of the first weight that no function-call mode sees."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5, dtype=f64), nn.Linear(5, 3, dtype=f64)
        self.calls, self.hidden = 0, False

    def forward(self, x):
        self.calls += 1
        h = self.first(x)
        if self.hidden or x[0, 0] > 9:
            h = h + Unseen.apply(x, self.first.weight)
        return self.second(h.tanh())


class Sorting(nn.Module):
    """Runs its first layer on sorted examples, as recurrent nets on packed sequences, and the second on them as
    given.
    """

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5, dtype=f64), nn.Linear(5, 3, dtype=f64)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.second(self.first(x[order]).tanh()[order.argsort()])


def kernel(model, x):
    j = reference.jacobian(model, x).flatten(0, 1)
    return j @ j.T


def test_a_graph_is_proved_once():
    model, x = Counting(), torch.randn(8, 4, dtype=f64)
    nng.GramMatrix(model, [x])
    first, model.calls = model.calls, 0
    nng.GramMatrix(model, [x])
    later = model.calls
    assert later == first - 2  # all but the two halves run by themselves
    forget(model)
    model.calls = 0
    nng.GramMatrix(model, [x])
    assert model.calls == first


def test_another_graph_is_proved_anew():
    model, x = Counting(), torch.randn(8, 4, dtype=f64)
    torch.testing.assert_close(nng.GramMatrix(model, [x]).to_dense(), kernel(model, x))
    model.hidden = True
    for _ in range(2):  # the second time from memory
        torch.testing.assert_close(nng.GramMatrix(model, [x]).to_dense(), kernel(model, x))
    model.hidden = False
    torch.testing.assert_close(nng.GramMatrix(model, [x]).to_dense(), kernel(model, x))


def test_a_branch_taken_by_a_later_batch_is_proved():
    model, x = Counting(), torch.randn(6, 4, dtype=f64)
    x[3:, 0] = 10
    loader = [(x[:3],), (x[3:],)]
    expected = torch.stack([reference.fisher(model, b) for (b,) in loader]).mean(0)
    torch.testing.assert_close(nng.FIM(model, loader, nng.PMatDense).to_dense(), expected)
    torch.testing.assert_close(
        nng.FIM(model, loader, nng.PMatDiag).diag().flat(), expected.diagonal()
    )  # two structures, added
    with pytest.raises(nng.NNGeomError, match="different ways"):
        nng.FIM(model, loader, nng.PMatKFAC)


def test_an_order_that_depends_on_the_data_is_proved_of_every_batch():
    model, x = Sorting(), torch.randn(12, 4, dtype=f64)
    x[:6] = x[:6][x[:6, 0].argsort()]  # the first batch stays as it is
    loader = [(x[:6],), (x[6:],)]
    for _ in range(2):
        torch.testing.assert_close(nng.GramMatrix(model, loader).to_dense(), kernel(model, x))
        torch.testing.assert_close(nng.FIM(model, loader, nng.PMatDense).to_dense(), reference.fisher(model, x))
        torch.testing.assert_close(
            nng.FIM(model, loader, nng.PMatDiag).diag().flat(), reference.fisher(model, x).diagonal()
        )


def test_a_constant_decides_where_examples_lie():
    class Across(nn.Module):
        """As many positions as examples; the axes may be swapped before a layer."""

        def __init__(self):
            super().__init__()
            self.layer, self.swapped = nn.Linear(3, 2, dtype=f64), False

        def forward(self, x):
            y = (
                self.layer(x.transpose(0, 1)).transpose(0, 1)
                if self.swapped
                else self.layer(x.transpose(0, 0)).transpose(0, 0)
            )
            return y.tanh().sum(1)

    model, x = Across(), torch.randn(4, 4, 3, dtype=f64)
    for model.swapped in (False, True, False):
        torch.testing.assert_close(nng.GramMatrix(model, [x]).to_dense(), kernel(model, x))


@pytest.mark.filterwarnings("ignore::nngeom.MemoryWarning")
def test_a_table_of_as_many_rows_as_examples_is_taken_for_theirs():
    """Nothing tells it from one input an example; what a function closes over is of all, and never cut."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.ids = nn.Linear(3, 2, dtype=f64), nn.Embedding(5, 2, dtype=f64)

        def forward(self, x, table):
            return (self.layer(x) + self.ids(table).mean(0)).tanh()

    model = Table()
    x, table = torch.randn(6, 3, dtype=f64), torch.tensor([0, 1, 1, 2, 3, 4])
    with pytest.raises(nng.CoverageError, match="function= closes over"):
        nng.GramMatrix(model, [{"x": x, "table": table}])
    of_all = lambda x: model(x, table)
    j = reference.jacobian(model, x, of_all)
    kernel = nng.GramMatrix(model, [(x,)], function=of_all, memory_budget=800)
    torch.testing.assert_close(kernel.tensor, torch.einsum("cnd,emd->cnem", j, j))


@pytest.mark.parametrize("measure", ["FIM", "kernel", "map", "Hessian", "dense Hessian"])
def test_a_later_batch_that_mixes_is_refused_by_products_too(measure):
    """One batch does not stand for the others."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 5, dtype=f64), nn.Linear(5, 3, dtype=f64)

        def forward(self, x):
            h = self.first(x)
            return self.second((h - h.mean(0) if x[0, 0] > 9 else h).tanh())

    model, x, y = Centred(), torch.randn(8, 4, dtype=f64), torch.zeros(8, dtype=torch.long)
    x[4:, 0] = 10
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    call = {
        "FIM": lambda: nng.FIM(model, data, nng.PMatImplicit),
        "kernel": lambda: nng.GramMatrix(model, data, nng.FMatImplicit),
        "map": lambda: nng.Jacobian(model, data, nng.PushForwardImplicit),
        "Hessian": lambda: nng.Hessian(model, data, loss="cross_entropy"),
        "dense Hessian": lambda: nng.Hessian(model, data, nng.PMatDense, loss="cross_entropy"),
    }[measure]
    with pytest.raises(nng.CoverageError, match="mixes"):
        call()


def test_a_determinant_penalty_knows_where_examples_lie():
    model, x = Sorting(), torch.randn(5, 4, dtype=f64)
    value = nng.mgs.logdet_penalty(model, x, jitter=0.1)
    expected = torch.linalg.slogdet(kernel(model, x) + 0.1 * torch.eye(15, dtype=f64))[1]
    torch.testing.assert_close(value, expected)
