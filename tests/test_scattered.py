"""Uses whose examples the data scatters, against autograd: rows are told apart by numbers, and keep their structure."""

import itertools

import pytest
import torch
from cases import representation
from exactness import close, require_exact
from optimizing import PRESETS, one_step
from optimizing import close as near
from torch import nn
from torch.nn import functional as F

import nngeom as nng

f64 = torch.float64
D, H, C, N, T = 4, 5, 3, 7, 3


class Scattering(nn.Module):
    """Layers on rows that ``way`` takes from ``x [n, t, d]`` and adds up again, then a head."""

    def __init__(self, way, experts=1, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.up = nn.ModuleList(nn.Linear(D, H, bias=bias) for _ in range(experts))
        self.norm, self.down = nn.LayerNorm(H), nn.ModuleList(nn.Linear(H, D) for _ in range(experts))
        self.stack, self.gate, self.head = nn.Parameter(torch.randn(2, D, D)), nn.Linear(D, experts), nn.Linear(D, C)
        self.double()

    def expert(self, e, rows):
        return self.down[e](self.norm(self.up[e](rows).tanh()))

    def forward(self, x):
        return self.head(self.way(self, x).tanh().mean(1))


def routed(m, x):
    """Two of three experts for every token."""
    z = x.flatten(0, 1)
    weights, chosen = m.gate(z).softmax(-1).topk(2, -1)
    out = torch.zeros_like(z)
    for e in range(len(m.up)):
        row, k = torch.where(chosen == e)
        out = out.index_add(0, row, m.expert(e, z[row]) * weights[row, k].unsqueeze(1))
    return (z + out).view_as(x)


def stacked(m, x):
    """Matrices of one parameter, a token each by its sign."""
    z = x.flatten(0, 1)
    out = torch.zeros_like(z)
    for e, sign in enumerate((z[:, 0] > 0, z[:, 0] <= 0)):
        (row,) = torch.where(sign)
        out = out.index_add(0, row, F.linear(z[row], m.stack[e]))
    return out.view_as(x)


def without_padding(m, x):
    """Tokens that count in one table, as kernels for sequences of unequal lengths have them."""
    there = x[..., 1] > -0.5
    return x.masked_scatter(there.unsqueeze(-1), m.expert(0, x[there]))


def in_no_order(m, x):
    order = x.flatten(0, 1)[:, 0].argsort()
    return m.expert(0, x.flatten(0, 1)[order])[order.argsort()].view_as(x)


def starved(m, x):
    """An expert that no token goes to."""
    z = without_padding(m, x).flatten(0, 1)
    (none,) = torch.where(z[:, 0] > 1e9)
    return z.index_add(0, none, m.expert(1, z[none])).view_as(x)


def one_at_a_time(m, x):
    """Vectors, without any axis for examples or positions."""
    return torch.stack([torch.stack([m.expert(0, token) for token in example]) for example in x])


WAYS = {
    "routed": (routed, 3, True),
    "routed, no bias": (routed, 3, False),
    "stacked": (stacked, 1, True),
    "without padding": (without_padding, 1, True),
    "in no order": (in_no_order, 1, True),
    "starved": (starved, 2, True),
    "one at a time": (one_at_a_time, 1, True),
}
X = torch.randn(N, T, D, dtype=f64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", WAYS)
def test_rows_of_every_kind_are_exact(name):
    require_exact(Scattering(*WAYS[name]), X, hessian=False)


@pytest.mark.parametrize("name", WAYS)
def test_they_have_kronecker_factors(name):
    model = Scattering(*WAYS[name])
    rows = {r.name: r.structure for r in nng.explain(model, (X,)).rows}
    used = ("stack",) if name == "stacked" else [p for p in rows if p.startswith(("up", "down"))]
    assert all(rows[p] == "kronecker" for p in used), rows
    largest = max(p.numel() for p in model.parameters())
    nng.FIM(model, [(X[:4],), (X[4:],)], nng.PMatKFAC.options(block_limit=largest - 1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_are_averages_over_the_rows_that_are_there(sharing):
    """Of inputs with their ones and of gradients, written out from the rows of every example."""
    model, y = Scattering(without_padding), torch.arange(N) % C
    there = X[..., 1] > -0.5
    collection = nng.LayerCollection.from_model(model, include="up.0.*")
    fisher = nng.EmpiricalFIM(
        model, (X, y), nng.PMatKFAC.options(sharing=sharing), loss="cross_entropy", layer_collection=collection
    )
    rows = model.up[0](X[there]).detach().requires_grad_()
    hidden = X.masked_scatter(there.unsqueeze(-1), model.down[0](model.norm(rows.tanh())))
    F.cross_entropy(model.head(hidden.tanh().mean(1)), y, reduction="sum").backward()
    a, each = torch.cat([X[there], torch.ones(len(rows), 1, dtype=f64)], 1), len(rows) / N
    a, g = (torch.zeros(N, T, p.shape[1], dtype=f64).masked_scatter(there.unsqueeze(-1), p) for p in (a, rows.grad))
    if sharing == "expand":
        left, right = torch.einsum("nti,ntj->ij", a, a) / N, torch.einsum("nto,ntp->op", g, g) / N / each
    else:
        left, right = (a.sum(1).T @ a.sum(1)) / N / each**2, g.sum(1).T @ g.sum(1) / N
    # parameters lie as the weight, then the bias
    block = torch.kron(right, left).view(H, D + 1, H, D + 1)
    order = torch.cat([(torch.arange(H)[:, None] * (D + 1) + torch.arange(D)).flatten(), torch.arange(H) * (D + 1) + D])
    close(fisher.to_dense(), block.reshape(H * (D + 1), -1)[order][:, order])


@pytest.mark.parametrize("preset", ["kfac", "ekfac", "kfac-reduce", "block-diag", "diag"])
def test_the_step_of_an_optimizer_is_the_solve(preset):
    representation_, damping, make = PRESETS[preset]
    model, y = Scattering(routed, 3), torch.arange(N) % C
    kind = representation(representation_, model) if isinstance(representation_, str) else representation_
    matrix = nng.EmpiricalFIM(model, (X, y), kind, loss="cross_entropy")
    g, step = one_step(make(model), X, y)
    assert near(step, matrix.solve(g, damping))


CUTS = ([0, 1, 7], [0, 4, 7], [0, 2, 5, 7], [0, 3, 5, 7], range(N + 1))
KRONECKER = {
    "expand": nng.PMatKFAC,
    "reduce": nng.PMatKFAC.options(sharing="reduce"),
    "ekfac": nng.PMatEKFAC,
    "ekfac reduce": nng.PMatEKFAC.options(sharing="reduce"),
    "nearest": nng.PMatKFAC.options(fit="nearest"),
    "diagonal": nng.PMatKFAC.options(factor_limit=3),
    "diagonal reduce": nng.PMatKFAC.options(factor_limit=3, sharing="reduce"),
    "low rank": nng.PMatKFAC.options(factor_limit=3, factor_form=("low_rank", 2)),
    "low rank reduce": nng.PMatKFAC.options(factor_limit=3, factor_form=("low_rank", 2), sharing="reduce"),
}


def cut(at, *tensors):
    return [tuple(t[lo:hi] for t in tensors) for lo, hi in itertools.pairwise(at)]


class Choosing(nn.Module):
    """Layers of which an example runs through one, and some batches through one alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = (nn.Linear(D, o, dtype=f64) for o in (D, D, C))

    def forward(self, x):
        chosen = [self.first if row[0, 0] > 0 else self.second for row in x]
        return torch.cat([self.head(layer(row[None]).tanh().mean(1)) for layer, row in zip(chosen, x)])


def require_one_matrix(model, x, kind):
    """However the data are cut, into single examples too."""
    y = torch.arange(N) % C
    of = lambda data: nng.EmpiricalFIM(model, data, KRONECKER[kind], loss="cross_entropy")
    whole = of((x, y))
    for at in CUTS[:2] if kind == "nearest" else CUTS:
        parts = of(cut(at, x, y))
        if kind == "ekfac reduce" and len(at) > N:  # a basis of directions that reduced factors have nothing of is any
            close(parts.trace(), whole.trace(), 1e-9)
        else:
            close(parts.to_dense(), whole.to_dense(), 1e-9)
        for one, other in zip(getattr(parts, "dropped", ()), getattr(whole, "dropped", ())):
            assert abs(one.share - other.share) < 1e-9


@pytest.mark.parametrize("kind", KRONECKER)
def test_factors_of_layers_that_some_examples_run_through(kind):
    require_one_matrix(Choosing(), X[X[:, 0, 0].argsort()], kind)


SEQUENCES = {
    "tokens by themselves": lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.LayerNorm(D), nn.Linear(D, C)),
    "attention": lambda: nn.TransformerEncoderLayer(D, 2, 6, dropout=0.0, batch_first=True),
    "states": lambda: nn.GRU(D, C, batch_first=True),
    "windows": lambda: nn.Sequential(Turned(), nn.Conv1d(D, C, 3, padding=1), Turned()),
    "windows of groups": lambda: nn.Sequential(Turned(), nn.Conv1d(D, D, 3, groups=2, padding=1), Turned()),
}


class Turned(nn.Module):
    def forward(self, x):
        return x.mT


class Summed(nn.Module):
    """The sum over the steps of a sequence."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.body = body().double().eval()

    def forward(self, x):
        out = self.body(x)
        return (out[0] if isinstance(out, tuple) else out).sum(1)


@pytest.mark.parametrize("kind", ["expand", "reduce", "diagonal"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_single_examples_count_as_those_of_their_length(name, kind):
    """Where the graph tells whose positions are whose, examples of one length in one batch or by themselves."""
    model = Summed(SEQUENCES[name])
    batches = [torch.randn(2, t, D, dtype=f64) for t in (3, 5, 2)]
    fisher = lambda data: nng.FIM(model, data, KRONECKER[kind], likelihood="gaussian").to_dense()
    close(fisher([(x[None],) for b in batches for x in b]), fisher([(b,) for b in batches]), 1e-9)


@pytest.mark.parametrize("kind", KRONECKER)
@pytest.mark.parametrize("name", ["routed", "routed, no bias", "without padding", "starved", "one at a time"])
def test_factors_do_not_depend_on_how_data_are_cut(name, kind):
    require_one_matrix(Scattering(*WAYS[name]), X, kind)


def test_factors_have_the_dtype_of_the_model():
    model = Scattering(routed, 3).float()
    assert nng.FIM(model, [(torch.randn(N, T, D),)], nng.PMatKFAC).to_dense().dtype == torch.float32


class Windows(nn.Module):
    """A convolution of some of the images, in one table of the data's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv1d(2, 3, 2), nn.Linear(3, C)

    def forward(self, x):
        some = x[..., 0, 0] > -0.5
        hidden = x.new_zeros(*x.shape[:2], 3).masked_scatter(some.unsqueeze(-1), self.conv(x[some]).tanh().mean(-1))
        return self.head(hidden.sum(1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("sua", [False, True])
def test_windows_do_not_depend_on_how_data_are_cut(sharing, sua):
    model, y = Windows().double(), torch.arange(N) % C
    x = torch.randn(N, 4, 2, 5, dtype=f64, generator=torch.Generator().manual_seed(2))
    kind = nng.PMatKFAC.options(sharing=sharing, sua=sua)
    of = lambda data: nng.EmpiricalFIM(model, data, kind, loss="cross_entropy").to_dense()
    for at in CUTS:
        close(of(cut(at, x, y)), of((x, y)), 1e-9)


def test_a_matrix_used_for_scattered_rows_and_transposed():
    """Uses in both orientations, of numbers of positions of their own."""

    class Both(Scattering):
        def forward(self, x):
            there, (down, up) = x[..., 1] > -0.5, (self.down[0].weight, self.down[0].weight.mT)
            hidden = F.linear(F.linear(x[there], up).tanh(), down)
            return self.head(x.masked_scatter(there.unsqueeze(-1), hidden).tanh().mean(1))

    model, y = Both(None), torch.arange(N) % C
    lc = nng.LayerCollection.from_model(model, include=["down.0.weight", "head.*"])
    for sharing in ("expand", "reduce"):
        kind = nng.PMatKFAC.options(sharing=sharing)
        whole, *parts = (
            nng.EmpiricalFIM(model, data, kind, loss="cross_entropy", layer_collection=lc).to_dense()
            for data in ((X, y), *(cut(at, X, y) for at in CUTS))
        )
        for part in parts:
            close(part, whole, 1e-9)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_equal_numbers_of_positions_are_as_where_nothing_is_scattered(sharing):
    """Rows in another order, and the same rows where they lie."""

    def plain(m, x):
        return m.expert(0, x)

    kind = nng.PMatKFAC.options(sharing=sharing)
    matrices = [nng.FIM(Scattering(way), cut(CUTS[0], X), kind) for way in (in_no_order, plain)]
    close(matrices[0].to_dense(), matrices[1].to_dense(), 1e-9)


class Sorted(nn.Module):
    """Two of three experts for every token, without biases: one parameter and products in groups, or a layer each."""

    def __init__(self, grouped, width=D):
        super().__init__()
        torch.manual_seed(0)
        matrices = torch.randn(3, 8, width)
        self.experts = nn.Parameter(matrices) if grouped else nn.ParameterList([*matrices])
        self.gate, self.head = nn.Linear(width, 3), nn.Linear(8, C)

    def forward(self, x):
        z = x.flatten(0, 1)
        weights, chosen = self.gate(z).softmax(-1).topk(2, -1)
        expert, order = chosen.flatten().sort(stable=True)
        ends = expert.bincount(minlength=3).cumsum(0)
        rows = z[order // 2]
        if isinstance(self.experts, nn.Parameter):
            out = F.grouped_mm(rows, self.experts.mT, offs=ends.int())
        else:
            out = torch.cat([F.linear(r, w) for r, w in zip(rows.tensor_split(ends[:-1]), self.experts)])
        out = out.tanh() * weights.flatten()[order].unsqueeze(1)
        return self.head(out.new_zeros(len(z), 8).index_add(0, order // 2, out).unflatten(0, x.shape[:2]).mean(1))


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no products in groups")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_in_groups_do_not_depend_on_how_data_are_cut(sharing):
    kind = nng.PMatKFAC.options(sharing=sharing)
    one, two = (
        nng.FIM(Sorted(grouped=True), data, kind).to_dense() for data in ((X.float(),), cut(CUTS[1], X.float()))
    )
    close(one, two, 1e-4)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no products in groups")
@pytest.mark.parametrize("kind", ["dense", "diag", "kfac", "kfac-reduce", "ekfac", "implicit"])
def test_products_in_groups_are_those_of_a_layer_each(kind):
    """Rows, and the factors of every expert: its own rows count."""
    x = X.float()
    kind = nng.PMatKFAC.options(sharing="reduce") if kind == "kfac-reduce" else kind
    one, each = (
        nng.FIM(m, [(x[:4],), (x[4:],)], representation(kind, m) if isinstance(kind, str) else kind)
        for m in (Sorted(grouped=True), Sorted(grouped=False))
    )
    v = nng.PVector.randn(one.layer_collection)
    assert one.layer_collection.names[0] == "experts"
    close(one.mv(v).flat(), each.mv(nng.PVector.from_flat(each.layer_collection, v.flat())).flat(), 1e-4)


class Tied(Sorted):
    """The same matrices there and back, or a layer each."""

    def forward(self, x):
        z = x.flatten(0, 1)
        expert, order = self.gate(z).argmax(-1).sort(stable=True)
        ends = expert.bincount(minlength=3).cumsum(0)
        h = z[order]
        if isinstance(self.experts, nn.Parameter):
            h = F.grouped_mm(F.grouped_mm(h, self.experts.mT, offs=ends.int()).tanh(), self.experts, offs=ends.int())
        else:
            parts = zip(h.tensor_split(ends[:-1]), self.experts)
            h = torch.cat([F.linear(F.linear(r, w).tanh(), w.T) for r, w in parts])
        return h[order.argsort()].view_as(x).mean(1)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no products in groups")
@pytest.mark.parametrize("kind", ["dense", "diag", "block-diag", "implicit"])
def test_matrices_of_products_in_groups_may_be_tied(kind):
    x = torch.randn(N, T, 8, generator=torch.Generator().manual_seed(1))
    one, each = (
        nng.FIM(m, [(x[:4],), (x[4:],)], representation(kind, m), layer_collection=experts_of(m))
        for m in (Tied(grouped=True, width=8), Tied(grouped=False, width=8))
    )
    close(one.diag().flat(), each.diag().flat(), 1e-4)


def experts_of(model):
    return nng.LayerCollection.from_model(model, include=lambda name, p: name.startswith("experts"))


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no products in groups")
@pytest.mark.parametrize("kind", ["dense", "block-diag", "low-rank", "ekfac"])
def test_products_in_groups_in_a_metric_are_those_of_a_layer_each(kind):
    """Rows side by side over all parameters, in the dtype of the model."""
    x, y = X.float(), torch.arange(N) % C
    train, test = [(x[:4], y[:4]), (x[4:], y[4:])], [(x[2:5], y[2:5])]

    def found(m, fisher):
        kernel = nng.GramMatrix(m, train, other=test, metric=fisher.inverse(0.3), loss="cross_entropy")
        return kernel.to_dense(), nng.influence(m, train, test, fisher, damping=0.3, loss="cross_entropy").scores

    one, each = ((m, nng.FIM(m, train, representation(kind, m))) for m in (Sorted(grouped=True), Sorted(grouped=False)))
    if kind == "block-diag":  # one block of all experts there, and one each here
        each = one[0], nng.PMatDense.from_tensor(one[1].layer_collection, one[1].to_dense())
    for x, y in zip(found(*one), found(*each)):
        close(x, y, 1e-3)


def test_positions_of_their_own_are_left_to_the_fallback():
    """Rows of an example have no order among positions."""
    model = Scattering(without_padding)
    with pytest.raises(nng.NNGeomError):
        nng.GramMatrix(model, [(X,)], by_position=True)


def test_mixed_rows_are_no_rows_of_one_example():
    """A row made of two examples: exact by the fallback, or refused."""

    def mixed(m, x):
        z = x.flatten(0, 1)
        return m.expert(0, z[z[:, 0].argsort()] + z.flip(0)).view_as(x)

    with pytest.raises(nng.CoverageError, match="mixes"):
        nng.Jacobian(Scattering(mixed), [(X,)])
