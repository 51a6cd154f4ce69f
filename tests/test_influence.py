"""Influence against dense rows and inverses, what is kept of it, and the judges of scores."""

import math

import pytest
import reference
import torch
from cases import CASES, STORED, build, representation
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.analysis import leave_one_out, linear_datamodeling_score
from nngeom.core import costs

FEW = ["mlp", "conv2d", "embedding", "tied", "layer-norm", "gru", "language-model"]


def loss(outputs, targets):
    """For outputs with and without positions."""
    return F.cross_entropy(outputs.flatten(1), targets, reduction="none")


def first(outputs, targets):
    return outputs.flatten(1)[:, 0].square()


def close(x, y, tol=1e-10):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def gradients(model, loader, of=loss):
    x, y = (torch.cat(part) for part in zip(*loader))
    return reference.loss_gradients(model, x, y, of)


class Asked:
    """A model, queries, a damped matrix, and the dense truth."""

    def __init__(self, name, kind):
        self.case, self.queries = build(name), build(name, sizes=(2, 1, 2)).loader
        self.matrix = nng.GGN(self.case.model, self.case.loader, representation(kind, self.case.model), loss=loss)
        self.damping = 1 + 3 * float(self.matrix.diag().flat().max()) if kind == "quasi-diag" else 0.3
        self.inverse = self.matrix.inverse(self.damping).to_dense()
        self.g = gradients(self.case.model, self.case.loader)

    def expected(self, of=loss):
        return gradients(self.case.model, self.queries, of) @ self.inverse @ self.g.T

    def __call__(self, **options):
        options = {"loss": loss, "damping": self.damping} | options
        return nng.influence(self.case.model, self.case.loader, self.queries, self.matrix, **options)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("name", FEW)
def test_scores_are_those_of_dense_rows(name, kind, monkeypatch):
    asked = Asked(name, kind)
    found = asked()
    close(found.scores, asked.expected())
    close(found.self_scores, torch.einsum("nd,de,ne->n", asked.g, asked.inverse, asked.g))
    assert found.values is None and found.indices is None and found.by_layer == {}
    monkeypatch.setattr(costs, "QUERIES", 2)
    close(asked().scores, asked.expected())


@pytest.mark.parametrize("name", CASES)
def test_every_model(name):
    asked = Asked(name, "ekfac")
    close(asked().scores, asked.expected())


@pytest.mark.parametrize("kind", ["dense", "diag", "kfac", "ekfac", "mixed"])
@pytest.mark.parametrize("name", FEW)
def test_budgets_layers_and_functions(name, kind):
    """Queries that have no room together, shares of layers, queries that are no losses."""
    asked = Asked(name, kind)
    found = asked(by_layer=True, memory_budget=20_000, query_function=first)
    close(found.scores, asked.expected(first))
    close(sum(found.by_layer.values()), asked.expected(first))
    assert list(found.by_layer) == list(nng.LayerCollection.from_model(asked.case.model).by_layer())
    lc, at = nng.LayerCollection.from_model(asked.case.model), 0
    through = gradients(asked.case.model, asked.queries, first) @ asked.inverse
    at = 0
    columns = {layer: [] for layer in lc.by_layer()}
    for layer, shape in zip(lc.layers, lc.shapes):
        columns[layer] += range(at, at + math.prod(shape))
        at += math.prod(shape)
    for layer, scores in found.by_layer.items():
        share = through[:, columns[layer]] @ asked.g[:, columns[layer]].T
        torch.testing.assert_close(scores, share, rtol=1e-9, atol=1e-9 * float(asked.expected(first).abs().max()))


def test_factored_damping():
    asked = Asked("conv2d", "kfac")
    damping = nng.FactoredTikhonov(0.3)
    asked.inverse = asked.matrix.inverse(damping).to_dense()
    close(asked(damping=damping).scores, asked.expected())
    asked = Asked("mlp", "dense")
    asked.inverse = torch.linalg.pinv(asked.matrix.to_dense(), hermitian=True, atol=1e-6)
    close(asked(damping=nng.Cutoff(1e-6)).scores, asked.expected(), 1e-7)


@pytest.mark.parametrize("budget", [None, 20_000])
def test_the_largest_are_those_of_all(budget):
    asked = Asked("mlp", "ekfac")
    best = asked(top=3, memory_budget=budget)
    expected = asked.expected().topk(3)
    close(best.values, expected.values)
    assert torch.equal(best.indices, expected.indices) and best.scores is None
    assert asked(top=99).indices.shape == (5, asked.case.n)


def test_an_iterator_is_read_once_and_kept():
    asked = Asked("mlp", "ekfac")
    args = (asked.case.model, iter(asked.case.loader), iter(asked.queries), asked.matrix)
    close(nng.influence(*args, loss=loss, damping=0.3, memory_budget=2000).scores, asked.expected())


def test_a_loader_that_shuffles_is_read_once():
    """Several loads of queries, one order of the training examples."""
    asked = Asked("mlp", "ekfac")
    orders = [list(range(asked.case.n)), list(range(asked.case.n))[::-1], [3, 1, 2, 0, 6, 5, 4]]

    class Shuffled:
        def __iter__(self):
            order = orders.pop()
            return iter([(asked.case.inputs[order], asked.case.targets[order])])

    args = (asked.case.model, Shuffled(), asked.queries, asked.matrix)
    found = nng.influence(*args, loss=loss, damping=0.3, memory_budget=2000)
    close(found.scores, asked.expected()[:, [3, 1, 2, 0, 6, 5, 4]])
    assert len(orders) == 2


def test_products_alone():
    """An implicit matrix: one solve a query, none an example."""
    asked = Asked("mlp", "dense")
    implicit = nng.GGN(asked.case.model, asked.case.loader, nng.PMatImplicit, loss=loss)
    found = nng.influence(asked.case.model, asked.case.loader, asked.queries, implicit, loss=loss, damping=0.3)
    close(found.scores, asked.expected(), 1e-5)
    assert found.self_scores is None


def test_a_part_of_the_parameters():
    asked = Asked("mlp", "dense")
    lc = nng.LayerCollection.from_model(asked.case.model, include="2.*")
    matrix = nng.EmpiricalFIM(asked.case.model, asked.case.loader, nng.PMatDense, loss=loss, layer_collection=lc)
    found = nng.influence(asked.case.model, asked.case.loader, asked.queries, matrix, loss=loss, damping=0.1)
    q = gradients(asked.case.model, asked.queries)[:, -lc.numel :]
    close(found.scores, q @ matrix.inverse(0.1).to_dense() @ asked.g[:, -lc.numel :].T)


def test_files(tmp_path):
    asked, path = Asked("mlp", "ekfac"), tmp_path / "scores.npy"
    for _ in range(2):
        found = asked(out=path)
        close(found.scores, asked.expected())
        close(found.self_scores, asked().self_scores)
    with pytest.raises(nng.ArgumentError, match="metric"):
        asked(out=path, damping=0.2)
    with pytest.raises(nng.ArgumentError, match="the loss"):
        asked(out=path, query_function=first)
    with pytest.raises(nng.ArgumentError, match="the loss"):
        asked(out=path, loss=first, query_function=loss)


def test_removing_an_example_changes_the_loss_as_predicted():
    """Of a ridge regression, whose optimum is known: the loss without example ``i`` rises by the score over ``n``."""
    torch.manual_seed(0)
    n, ridge = 400, 1e-2
    x = torch.randn(n, 3, dtype=torch.float64)
    y = x @ torch.randn(3, 1, dtype=torch.float64) + torch.randn(n, 1, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()

    def fitted(keep):
        a, b = x[keep], y[keep]
        return torch.linalg.solve(a.T @ a + n * ridge * torch.eye(3, dtype=torch.float64), a.T @ b)

    everything = torch.ones(n, dtype=torch.bool)
    model.weight.data = fitted(everything).T
    half = lambda f, t: (f - t).square().sum(1) / 2
    hessian = nng.GGN(model, [(x, y)], nng.PMatDense, loss=half)
    q, t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    scores = nng.influence(model, [(x, y)], [(q, t)], hessian, loss=half, damping=ridge).scores
    without = []
    for i in range(20):
        keep = everything.clone()
        keep[i] = False
        without.append(((q @ fitted(keep) - t).square() - (q @ fitted(everything) - t).square()).sum(1) / 2)
    torch.testing.assert_close(scores[:, :20] / n, torch.stack(without, 1), rtol=0.1, atol=2e-4)
    assert leave_one_out(scores, torch.stack(without), torch.arange(20)).mean > 0.95


def test_what_is_refused():
    asked = Asked("mlp", "ekfac")
    case, other = asked.case, build("conv2d")
    with pytest.raises(nng.ArgumentTypeError, match="matrix is PMatEKFAC"):
        nng.influence(case.model, case.loader, asked.queries, nng.PMatEKFAC, loss=loss)
    with pytest.raises(nng.CollectionError):
        nng.influence(other.model, other.loader, other.loader, asked.matrix, loss=loss)
    with pytest.raises(nng.SingularError, match="damping"):
        asked(damping=None)
    with pytest.raises(nng.DampingError):
        asked(damping=-1.0)
    for top in (0, True, 1.5, "all"):
        with pytest.raises(nng.ArgumentError, match="top is"):
            asked(top=top)
    with pytest.raises(nng.ArgumentError, match="one of them"):
        asked(top=2, by_layer=True)
    with pytest.raises(nng.ArgumentTypeError, match="query_function is str"):
        asked(query_function="margin")
    for bad in (lambda f, y: f, lambda f, y: f.sum(), lambda f, y: f.detach()[:, 0], lambda f, y: 1.0):
        with pytest.raises(nng.OutputError, match="query_function returned"):
            asked(query_function=bad)
    with pytest.raises(nng.LoaderError, match="targets"):
        nng.influence(case.model, [case.inputs], asked.queries, asked.matrix, loss=loss, damping=0.1)
    with pytest.raises(nng.LoaderError, match="empty"):
        nng.influence(case.model, case.loader, [], asked.matrix, loss=loss, damping=0.1)
    with pytest.raises(nng.ArgumentTypeError, match="process_group"):
        asked(process_group=object())
    x, y = case.loader[0]
    nan = [(x, y), (x * math.nan, y)]
    with pytest.raises(nng.NonFiniteError, match="batch 1"):
        nng.influence(case.model, nan, asked.queries, asked.matrix, loss=loss, damping=0.1)
    with pytest.raises(nng.NonFiniteError):
        nng.influence(case.model, case.loader, nan, asked.matrix, loss=loss, damping=0.1)
    queries = [x for x, _ in asked.queries]  # a function of the outputs alone needs no targets
    alone = nng.influence(
        case.model, case.loader, queries, asked.matrix, loss=loss, damping=asked.damping, query_function=first
    )
    close(alone.scores, asked.expected(first))


# -- judges ------------------------------------------------------------------------------------------------------------


def spearman(x, y):
    from scipy.stats import spearmanr

    return spearmanr(x.numpy(), y.numpy()).statistic


def test_datamodelling_scores_are_rank_correlations():
    torch.manual_seed(0)
    scores = torch.randn(4, 30)
    subsets = torch.rand(12, 30) < 0.5
    losses = -(subsets.float() @ scores.T) + 3 * torch.randn(12, 4)
    losses[:3, 1] = losses[0, 1]  # ties
    found = linear_datamodeling_score(scores, losses, subsets)
    predicted = subsets.double() @ scores.double().T
    expected = torch.tensor([spearman(predicted[:, j], -losses[:, j]) for j in range(4)])
    torch.testing.assert_close(found.by_query, expected.double())
    torch.testing.assert_close(found.mean, expected.double().mean())
    assert found.interval[0] < found.mean < found.interval[1]
    assert torch.equal(found.interval, linear_datamodeling_score(scores, losses, subsets).interval)
    exact = linear_datamodeling_score(scores, -predicted, subsets)
    assert float(exact.mean) == pytest.approx(1.0) and exact.interval.tolist() == pytest.approx([1.0, 1.0])
    same = linear_datamodeling_score(scores, torch.ones(12, 4), subsets)
    assert same.by_query.isnan().all() and same.mean.isnan()


def test_leaving_one_out_is_a_rank_correlation():
    torch.manual_seed(0)
    scores, losses, some = torch.randn(3, 8), torch.randn(5, 3), torch.tensor([7, 0, 3, 4, 1])
    found = leave_one_out(scores, losses, some)
    expected = torch.tensor([spearman(scores[j, some], losses[:, j]) for j in range(3)])
    torch.testing.assert_close(found.by_query, expected.double())
    assert float(leave_one_out(scores, scores.T).mean) == pytest.approx(1.0)


def test_judges_say_what_is_wrong():
    scores, losses, subsets = torch.randn(2, 6), torch.randn(4, 2), torch.rand(4, 6) < 0.5
    for bad in (losses.T, losses[:3]):
        with pytest.raises(nng.ArgumentError, match="expected"):
            linear_datamodeling_score(scores, bad, subsets)
    with pytest.raises(nng.ArgumentError, match="booleans"):
        linear_datamodeling_score(scores, losses, subsets.float())
    with pytest.raises(nng.ArgumentError, match="NaN"):
        linear_datamodeling_score(scores * math.nan, losses, subsets)
    with pytest.raises(nng.ArgumentError, match="three"):
        linear_datamodeling_score(scores, losses[:2], subsets[:2])
    with pytest.raises(nng.ArgumentError, match="left out"):
        leave_one_out(scores, losses)
    with pytest.raises(nng.ArgumentError, match="indices"):
        leave_one_out(scores, losses, torch.tensor([0, 1, 2, 6]))
    with pytest.raises(nng.ArgumentTypeError, match="examples"):
        leave_one_out(scores, losses, [0, 1, 2, 3])
