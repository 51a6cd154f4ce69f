"""What an average is taken over: weights of classes, labels that are ignored, positions, draws, variances."""

import pytest
import reference
import torch
from cases import STORED, build, representation
from small import normal
from torch import nn

import nngeom as nng

f64 = torch.float64


def test_class_weights_reach_every_representation():
    layer = nn.Linear(4, 3).double()
    x, y = normal(1, 4), torch.tensor([2])
    loss = nng.CrossEntropy(weight=torch.tensor([0.2, 3.0, 5.0]))
    dense, kfac = (nng.GGN(layer, [(x, y)], r, loss=loss).to_dense() for r in (nng.PMatDense, nng.PMatKFAC))
    plain = nng.GGN(layer, [(x, y)], nng.PMatDense, loss="cross_entropy").to_dense()
    torch.testing.assert_close(kfac, dense)
    torch.testing.assert_close(dense, 5 * plain)


@pytest.mark.parametrize("kind", STORED)
def test_ignored_labels_count_nothing(kind):
    layer = nn.Linear(4, 3).double()
    batch = normal(1, 4), torch.tensor([-100])
    assert nng.GGN(layer, [batch], representation(kind, layer), loss="cross_entropy").trace() == 0


@pytest.fixture
def tokens():
    """A linear model of tokens, inputs, and labels of which some are ignored."""
    x, y = normal(3, 6, 4), torch.randint(0, 5, (3, 6))
    y[0, 2:] = -100
    return nn.Linear(4, 5).double(), x, y


def of_positions(model, x, y):
    """The Fisher matrix position by position, over the examples."""
    total = 0
    for i in range(len(x)):
        j = reference.jacobian(model, x[i : i + 1])[:, 0].view(6, 5, -1)
        for t in range(6):
            if y[i, t] != -100:
                total = total + reference.sandwich(j[t].unsqueeze(1), reference.softmax_metric(model(x[i, t][None])))
    return total / len(x)


def test_token_outputs_normalise_over_classes(tokens):
    model, x, y = tokens
    dense = nng.FIM(model, [(x, y)], nng.PMatDense, likelihood=nng.Categorical(dim=-1))
    torch.testing.assert_close(dense.to_dense(), of_positions(model, x, y))


def test_eigenvalues_of_token_outputs_add_up_to_the_trace(tokens):
    model, x, y = tokens
    m = nng.FIM(model, [(x, y)], nng.PMatEKFAC, likelihood=nng.Categorical(dim=-1))
    torch.testing.assert_close(m.trace(), of_positions(model, x, y).trace())


def test_labels_that_leave_one_axis_for_the_classes_say_which(tokens):
    model, x, y = tokens
    torch.testing.assert_close(nng.FIM(model, [(x, y)], nng.PMatDense).to_dense(), of_positions(model, x, y))


@pytest.mark.parametrize("batch", [lambda x, y: x, lambda x, y: (x[:, :5], y[:, :5])], ids=["no labels", "square"])
def test_where_the_axis_of_classes_is_open_it_is_asked_for(tokens, batch):
    model, x, y = tokens
    with pytest.raises(nng.OutputError, match="Categorical"):
        nng.FIM(model, [batch(x, y)], nng.PMatDiag)


def test_draws_of_a_gaussian_scale_with_the_inverse_variance():
    case = build("mlp")
    loader = [case.inputs] * 1
    exact_f = nng.FIM(case.model, loader, nng.PMatDense, likelihood=nng.Gaussian(4.0)).to_dense()
    draws = nng.FIM_MonteCarlo(
        case.model,
        loader,
        nng.PMatDense,
        likelihood=nng.Gaussian(4.0),
        samples=4000,
        generator=torch.Generator().manual_seed(0),
    )
    assert (draws.to_dense() - exact_f).norm() / exact_f.norm() < 0.1


def drawn(case, representation, loader=None, samples=3):
    return nng.FIM_MonteCarlo(
        case.model,
        case.loader if loader is None else loader,
        representation,
        samples=samples,
        generator=torch.Generator().manual_seed(5),
    )


def test_implicit_products_with_draws_are_of_one_matrix():
    m = drawn(build("mlp"), nng.PMatImplicit, samples=2)
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    assert torch.equal(m.mv(v).flat(), m.mv(v).flat())
    torch.testing.assert_close(m.vTMv(v), v.dot(m.mv(v)))


def test_draws_do_not_depend_on_batches():
    case = build("mlp")
    one, many = ([case.inputs], [(x,) for x in case.inputs.split(2)])
    torch.testing.assert_close(drawn(case, nng.PMatDense, one).to_dense(), drawn(case, nng.PMatDense, many).to_dense())


def test_draws_do_not_depend_on_the_representation():
    case = build("mlp")
    torch.testing.assert_close(
        drawn(case, nng.PMatDense, [case.inputs]).to_dense(), drawn(case, nng.PMatImplicit).to_dense()
    )
