"""Examples with a name: the data places examples, and there are more examples than weights that tell them apart."""

import functools

import pytest
import torch
from torch.nn import functional as F

import nngeom as nng

from .named import Model, inputs, jacobian_holds, truth
from .placings import Permuted
from .pools import POOLS

X = inputs(6)


# -- the data places examples ------------------------------------------------------------------------------------------


def expert_dispatch(m, x):
    one_hot = F.one_hot((x[:, 0] > 0).long(), 2)
    slot = (one_hot.cumsum(0) - 1).masked_fill(one_hot == 0, -1)
    dispatch = (slot[:, :, None] == torch.arange(len(x))).to(x.dtype)
    y = m.a(torch.einsum("nec,nm->ecm", dispatch, x)).tanh()
    return m.b(torch.einsum("nec,ecm->nm", dispatch, y))


def permutation_matrix(m, x):
    p = torch.eye(len(x), dtype=x.dtype)[x[:, 0].argsort()]
    return m.b(p.T @ m.a(p @ x).tanh())


def where_flipped(m, x):
    c = (x[:, :1] + x[:, :1].flip(0)) > 0
    y = m.a(torch.where(c, x, x.flip(0))).tanh()
    return m.b(torch.where(c, y, y.flip(0)))


def custom_permutation(m, x):
    order = x[:, 0].argsort()
    return m.b(Permuted.apply(m.a(Permuted.apply(x, order)).tanh(), order.argsort()))


def sorted_and_back(m, x):
    order = x[:, 0].argsort()
    return m.b(m.a(x[order]).tanh()[order.argsort()])


MOVERS = [expert_dispatch, permutation_matrix, where_flipped, custom_permutation, sorted_and_back]


@pytest.mark.parametrize("mover", MOVERS, ids=lambda f: f.__name__)
def test_one_batch_in_order_and_another_that_is_not(mover):
    model, other = Model(mover), inputs(6, seed=2)
    ordered = torch.cat([X[:, :1].abs().sort(0).values, X[:, 1:]], 1)  # sorted, of one expert, above zero
    jacobian_holds(model, ordered)
    jacobian_holds(model, other)
    jacobian_holds(model, ordered, other, X)


@pytest.mark.parametrize("pool", POOLS)
def test_tokens_pooled_into_examples(pool):
    def readout(m, x):
        kept = x[..., 0] > -0.5
        return m.b(POOLS[pool](m.a(x[kept]).tanh(), kept.nonzero()[:, 0], len(x)))

    model = Model(readout, hidden=4)
    full = inputs(5, 3, 4).abs()
    jacobian_holds(model, full)
    for seed in (2, 3):
        jacobian_holds(model, inputs(5, 3, 4, seed=seed))


# -- as many weights as examples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
@pytest.mark.parametrize("mover", MOVERS, ids=lambda f: f.__name__)
def test_any_two_examples_that_change_places_are_told_apart(mover, n):
    for seed in range(6):
        jacobian_holds(Model(mover), inputs(n, seed=seed))


def test_the_mixing_of_later_examples_is_seen():
    """Examples 4..7 of 8 are mixed, the others are not."""

    def mixed(m, x):
        h = m.a(x).tanh()
        return m.b(torch.cat([h[:4], h[4:] + 0.1 * h[4:].roll(1, 0)]))

    jacobian_holds(Model(mixed), inputs(8))


GROUPS = {
    "means of pairs": lambda g: g - g.mean(1, keepdim=True),
    "statistics of pairs": lambda g: (g - g.mean(1, keepdim=True)) / (1 + g.var(1, keepdim=True)).sqrt(),
    "swapped": lambda g: g.flip(1),
    "attention in pairs": lambda g: (g @ g.mT).softmax(-1) @ g,
}
MEASURES = {
    "jacobian": lambda m, x: nng.Jacobian(m, [x]),
    "products": lambda m, x: nng.Jacobian(m, [x], nng.PushForwardImplicit),
    "kernel": lambda m, x: nng.GramMatrix(m, [x]),
    "fisher": lambda m, x: nng.FIM(m, [x], nng.PMatDense),
    "kfac": lambda m, x: nng.FIM(m, [x]),
    "implicit": lambda m, x: nng.FIM(m, [x], nng.PMatImplicit),
    "hessian": lambda m, x: nng.Hessian(m, [(x, torch.zeros(len(x), 3).to(x))], nng.PMatDense, loss="mse"),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("group", GROUPS)
def test_examples_mixed_within_halves_are_seen_in_their_inputs(group, measure):
    """Pairs, of which each half of the batch holds whole ones, are the same in a run of a half."""

    def mixed(m, x):
        h = m.a(x)
        pairs = GROUPS[group](h[: len(h) // 2 * 2].unflatten(0, (-1, 2))).flatten(0, 1)
        return m.b(torch.cat([pairs, h[len(pairs) :]]).tanh())

    for n in (4, 8):
        with pytest.raises(nng.CoverageError, match="mixes"):
            MEASURES[measure](Model(mixed), inputs(n))


@pytest.mark.parametrize("measure", ["jacobian", "kernel", "fisher", "implicit"])
@pytest.mark.parametrize("group", GROUPS)
def test_tokens_mixed_within_halves_are_seen_by_every_second_example(group, measure):
    """Pairs again, of inputs that have no gradients."""

    def mixed(m, x):
        h = m.a(torch.nn.functional.one_hot(x, 4).to(m.a.weight.dtype).cumsum(1).sum(1))
        return m.b(GROUPS[group](h.unflatten(0, (-1, 2))).flatten(0, 1).tanh())

    tokens = torch.randint(0, 4, (8, 3), generator=torch.Generator().manual_seed(0))
    with pytest.raises(nng.CoverageError, match="mixes"):
        MEASURES[measure](Model(mixed), tokens)


def test_a_readout_of_many_small_graphs():
    """Nodes of eight graphs in one table, in no order."""

    def readout(m, x):
        rows, owner = x.flatten(0, 1), torch.arange(len(x)).repeat_interleave(x.shape[1])
        order = rows[:, 0].argsort()
        h = m.a(rows[order]).tanh()
        return m.b(h.new_zeros(len(x), 5).index_add(0, owner[order], h))

    jacobian_holds(Model(readout), inputs(8, 3, 4))


PROPAGATIONS = {
    "a product with a dense adjacency": lambda adjacency, h: adjacency @ h,
    "a product with a sparse adjacency": lambda adjacency, h: torch.sparse.mm(adjacency.to_sparse(), h),
    "messages along edges": lambda adjacency, h: h.new_zeros(h.shape).index_add(
        0, adjacency.nonzero().T[0], h[adjacency.nonzero().T[1]]
    ),
}


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_nodes_of_one_graph_are_positions_of_one_example(propagation):
    """A graph net mixes its nodes, and runs on all of them alone."""
    adjacency = (torch.rand(7, 7, generator=torch.Generator().manual_seed(3)) < 0.4).to(X.dtype) + torch.eye(7)

    def graph_net(m, x):
        spread = PROPAGATIONS[propagation]
        return m.b(spread(adjacency, m.a(spread(adjacency, x)).tanh()))

    model, nodes = Model(graph_net), inputs(7)
    t = truth(model, nodes)
    v = nng.PVector.from_model(model)
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    for kind in (nng.PMatDense, nng.PMatImplicit):
        with pytest.raises(nng.CoverageError, match="nodes of a graph, is passed as one"):
            nng.FIM(model, [nodes], kind)
    graph, one = nodes.unsqueeze(0), {"function": lambda x: model(x[0]).unsqueeze(0)}
    categorical = {"likelihood": nng.Categorical(dim=-1), **one}
    close(nng.Jacobian(model, [graph], **one).tensor.sum(1), t.rows.transpose(0, 1).flatten(0, 1))
    close(nng.FIM(model, [graph], nng.PMatDense, **categorical).to_dense(), 7 * t.fisher)
    close(nng.FIM(model, [graph], nng.PMatImplicit, **categorical).mv(v).flat(), 7 * t.fisher @ v.flat())
    close(nng.FIM(model, [graph], nng.PMatEKFAC, **categorical).trace(), 7 * t.fisher.trace())
    close(nng.GramMatrix(model, [graph], **one).trace(), t.trace)
