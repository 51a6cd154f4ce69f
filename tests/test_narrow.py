"""Second moments pulled back from the inputs of a linear head: the same numbers from fewer columns, or not that way."""

import pytest
import reference
import torch
from cases import CASES, build
from small import Function, model_of, normal
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.core.head import HeadJacobian
from nngeom.core.output_metric import DiagonalMetric
from nngeom.cotangents.output_metrics import SoftmaxMetric
from nngeom.pmat.diag import DiagBlock
from nngeom.sweep import narrow

REPRESENTATIONS = (nng.PMatDiag, nng.PMatKFAC, nng.PMatEKFAC)


@pytest.fixture
def taken(monkeypatch):
    """Heads are taken whatever their width; how many were, a batch each."""
    count = []
    once = narrow.Narrow.chunks

    def chunks(self, *args):
        count.append(self.head.width)
        return once(self, *args)

    monkeypatch.setattr(narrow, "GAIN", 0.0)
    monkeypatch.setattr(narrow.Narrow, "chunks", chunks)
    return count


def both(measure, monkeypatch):
    """The measure with heads, and without."""
    with_heads = measure()
    with monkeypatch.context() as patch:
        patch.setattr(narrow, "GAIN", float("inf"))
        return with_heads, measure()


def require_same(x, y, rtol=1e-9):
    """Block by block, of the size of the whole block."""
    assert list(x.blocks) == list(y.blocks)
    for layout, block in x.blocks.items():
        for a, b in zip(block.tensors(), y.blocks[layout].tensors()):
            if a.shape == b.shape and not isinstance(x, nng.PMatEKFAC):
                assert float((a - b).norm()) <= rtol * float(b.norm()) + 1e-30
    difference = x.to_dense() - y.to_dense()
    assert float(difference.norm()) <= rtol * float(y.to_dense().norm())


@pytest.mark.parametrize("name", list(CASES))
def test_every_model_has_the_numbers_of_all_columns(name, taken, monkeypatch):
    case = build(name)
    wanted = reference.fisher(case.model, case.inputs).diagonal()
    got = nng.FIM(case.model, case.loader, nng.PMatDiag).diag().flat()
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12 * float(wanted.max()))
    for kind in REPRESENTATIONS[1:]:
        require_same(*both(lambda kind=kind: nng.FIM(case.model, case.loader, kind), monkeypatch))


def wide(outputs=20, width=5):
    return model_of(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, width), nn.Tanh(), nn.Linear(width, outputs))


def data(outputs=20, sizes=(5, 3)):
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return [(draw(n), torch.randint(0, outputs, (n,), generator=generator)) for n in sizes]


def test_factors_are_those_of_the_dense_blocks(taken):
    """Output gradients of a layer are the rows of its bias."""
    model, loader = wide(), data()
    x = torch.cat([x for x, _ in loader])
    j, metric = reference.jacobian(model, x), reference.softmax_metric(model(x))
    fisher = nng.FIM(model, loader, nng.PMatKFAC)
    offsets, inputs = fisher.layer_collection.offsets(), {"0": x, "2": model[:2](x), "4": model[:4](x)}
    for layout, block in fisher.blocks.items():
        weight, bias = layout.names
        lo, (o,) = offsets[bias]
        g = reference.sandwich(j[..., lo : lo + o], metric)
        ones = torch.cat([inputs[weight[0]], torch.ones(len(x), 1)], 1)
        torch.testing.assert_close(block.g[0], g, rtol=1e-9, atol=1e-12 * float(g.abs().max()))
        torch.testing.assert_close(block.a[0], (ones.T @ ones / len(x)).detach(), rtol=1e-9, atol=0.0)
    assert taken == [5, 5]


@pytest.mark.parametrize("kind", REPRESENTATIONS)
@pytest.mark.parametrize(
    ("measure", "options"),
    [
        (nng.FIM, {}),
        (nng.FIM, {"likelihood": "bernoulli"}),
        (nng.FIM, {"likelihood": nng.Gaussian(torch.rand(20, dtype=torch.float64) + 0.5)}),
        (nng.GGN, {"loss": "cross_entropy"}),
        (nng.GGN, {"loss": nng.CrossEntropy(weight=torch.rand(20), label_smoothing=0.2, ignore_index=3)}),
        (nng.FIM, {"likelihood": "poisson"}),
    ],
)
def test_likelihoods_and_losses(kind, measure, options, taken, monkeypatch):
    model, loader = wide(), data()
    require_same(*both(lambda: measure(model, loader, kind, **options), monkeypatch))
    assert taken == [5, 5]


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_confident_models_and_heads_of_zeros(scale, dtype, taken, monkeypatch):
    model = wide().to(dtype)
    model[-1].weight.data *= scale
    loader = [(x.to(dtype), y) for x, y in data()]
    for kind in REPRESENTATIONS:
        rtol = 1e-9 if dtype == torch.float64 else 1e-4
        require_same(*both(lambda kind=kind: nng.FIM(model, loader, kind), monkeypatch), rtol)
    assert taken


class Language(nn.Module):
    """Tokens, one layer of attention, and a head of its own."""

    def __init__(self, words=12, width=4):
        super().__init__()
        self.embed, self.head = nn.Embedding(words, width), nn.Linear(width, words)
        self.mix = nn.TransformerEncoderLayer(width, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.head(self.mix(self.embed(x)))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("likelihood", [nng.CausalLM(), nng.Categorical(dim=-1)])
def test_positions_of_a_language_model(likelihood, sharing, taken, monkeypatch):
    model = model_of(Language())
    x = torch.randint(0, 12, (9, 4), generator=torch.Generator().manual_seed(2))
    y = x.clone()
    y[0, 1:] = -100
    y[:, 2] = -100
    # keys have no gradient when reduced: EKFAC's basis of these is any
    for kind in REPRESENTATIONS if sharing == "expand" else REPRESENTATIONS[:2]:
        options = {} if kind is nng.PMatDiag else {"sharing": sharing}
        require_same(
            *both(lambda kind=kind: nng.FIM(model, (x, y), kind, likelihood=likelihood, **options), monkeypatch)  # noqa: B023
        )
    assert set(taken) == {4}


def test_a_vocabulary_takes_as_many_passes_as_the_head_is_wide(monkeypatch):
    """The last token of a sequence, 50 257 words, width 12: all entries of the diagonal of the layers behind."""
    model = model_of(Function(lambda m, x: m.language(x)[:, -1], language=Language(50257, 12)))
    torch.manual_seed(0)
    head, x = model[0].language.head, torch.randint(0, 50257, (2, 3))
    model[0].f = lambda m, x: m.language.head(m.language.mix(m.language.embed(x))[:, -1])
    pulled = []
    plain = torch.autograd.grad

    def grad(outputs, inputs, v, **options):
        pulled.append(len(v) if options.get("is_grads_batched") else 1)
        return plain(outputs, inputs, v, **options)

    nng.FIM(model, (x, None), nng.PMatDiag)  # whatever is asked of a graph once
    monkeypatch.setattr(torch.autograd, "grad", grad)
    got = nng.FIM(model, (x, None), nng.PMatKFAC)
    assert sum(pulled) <= 12 + 10
    monkeypatch.undo()
    p, w = model(x).softmax(-1).detach(), head.weight.detach()
    metric = torch.einsum("nv,vi,vj->nij", p, w, w) - torch.einsum("ni,nj->nij", p @ w, p @ w)
    features = Function(lambda m, x: m.mix(m.embed(x))[:, -1], embed=model[0].language.embed, mix=model[0].language.mix)
    j = reference.jacobian(features, x)
    exact = reference.sandwich(j[..., model[0].language.embed.weight.numel() :], metric)
    diagonal = nng.FIM(model, (x, None), nng.PMatDiag)
    names = [n for n in diagonal.layer_collection.names if ".mix." in n]
    mine = torch.cat([diagonal.diag()[n].flatten() for n in names])
    torch.testing.assert_close(mine, exact.diagonal(), rtol=1e-8, atol=1e-12 * float(exact.diagonal().max()))
    (side,) = [b.g for layout, b in got.blocks.items() if layout.names[0].endswith("head.weight")]
    torch.testing.assert_close(side[0], (p * (1 - p)).mean(0), rtol=1e-9, atol=0.0)


def unlike():
    """Models and options whose heads are not what they seem, with the reason."""
    table = nn.Parameter(normal(9, 3))
    tied = Function(lambda m, x: F.linear(torch.tanh(m.w[x]), m.w), w=table)
    shifted = lambda m, x: F.linear(torch.tanh(F.linear(x, m.a, m.b[:3])), m.w, m.b)
    twice = Function(shifted, a=normal(3, 4), b=normal(9), w=normal(9, 3))
    scaled = Function(lambda m, x: 2 * m.head(m.body(x)), body=nn.Linear(4, 3), head=nn.Linear(3, 9))
    normed = Function(lambda m, x: F.layer_norm(m.head(m.body(x)), (9,)), body=nn.Linear(4, 3), head=nn.Linear(3, 9))

    def hooked(m, x):
        h = m.body(x)
        h.register_hook(lambda g: 3 * g)
        return m.head(h)

    bent = Function(hooked, body=nn.Linear(4, 3), head=nn.Linear(3, 9))
    return {"tied": tied, "bias used twice": twice, "scaled": scaled, "normalised": normed, "hooked": bent}


@pytest.mark.parametrize("name", unlike())
def test_heads_that_are_none_take_all_columns(name, taken):
    torch.manual_seed(5)
    model = unlike()[name].double()
    x = torch.randint(0, 9, (6,)) if name == "tied" else normal(6, 4)
    got = nng.FIM(model, (x, None), nng.PMatDiag).diag().flat()
    wanted = reference.fisher(model, x).diagonal()
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)
    assert not taken


class Sharper(nng.Categorical):
    """A likelihood of a user's that changes the root of another."""

    def square_root(self, outputs, targets=None):
        columns = super().square_root(outputs, targets)
        return type(columns)(columns.count, lambda lo, hi: 2 * columns.make(lo, hi))


def test_a_root_of_a_users_own_is_the_metric(taken):
    model, loader = wide(), data()
    got, plain = (nng.FIM(model, loader, nng.PMatDiag, likelihood=q).diag().flat() for q in (Sharper(), "categorical"))
    assert len(taken) == 2
    torch.testing.assert_close(got, 4 * plain)


class Unit(nng.PMatDiag):
    """A representation of a user's own that looks at every row."""

    @classmethod
    def recipe(cls, selection):
        def statistic(chunk):
            return {lay: {"d": j.matrix().abs().sum((0, 1))} for lay, j in chunk.jacobians.items()}

        means = yield statistic
        return {layout: DiagBlock(t["d"]) for layout, t in means.items()}


def test_other_representations_see_all_columns(taken):
    model, loader = wide(), data()
    for kind in (nng.PMatDense, nng.PMatBlockDiag, nng.PMatLowRank, Unit):
        nng.FIM(model, loader, kind)
    assert not taken


def test_mixtures_take_heads_where_all_members_do(taken, monkeypatch):
    model, loader = wide(), data()
    mixed = nng.PMatMixed({"4.*": nng.PMatDiag}, default=nng.PMatKFAC)
    require_same(*both(lambda: nng.FIM(model, loader, mixed), monkeypatch))
    assert taken == [5, 5]
    nng.FIM(model, loader, nng.PMatMixed({"4.*": nng.PMatDense}, default=nng.PMatKFAC))
    assert len(taken) == 2


def test_budgets_cut_columns(taken, monkeypatch):
    model, loader = wide(), data()
    whole = nng.FIM(model, loader, nng.PMatKFAC)
    monkeypatch.setattr(narrow, "PIECE_BYTES", 1)
    require_same(nng.FIM(model, loader, nng.PMatKFAC), whole)


@pytest.mark.parametrize("metric", ["softmax", "diagonal"])
@pytest.mark.parametrize("turned", [False, True])
def test_rows_of_a_head_are_its_columns(metric, turned):
    torch.manual_seed(0)
    n, t, c, i = 3, 2, 5, 4
    z, a = normal(n * t, c), normal(n, t, 1, i)
    if metric == "softmax":
        own, roots = SoftmaxMetric(z, torch.tensor([1, 0, 1, 2, 1, 1.0])), []
        for row, scale in zip(z.softmax(-1), own.scale):
            values, vectors = torch.linalg.eigh(scale * (torch.diag(row) - torch.outer(row, row)))
            roots.append(vectors * values.clamp_min(0).sqrt())
    else:
        own, roots = DiagonalMetric(z.square()), [torch.diag(row.abs()) for row in z]
    v = torch.zeros(t, c, n, t, c, dtype=torch.float64)
    for r, root in enumerate(roots):
        v[r % t, :, r // t, r % t] = root.T
    j = HeadJacobian(a, own, lambda: v.flatten(0, 1), t * c)
    if turned:
        q = torch.linalg.qr(normal(c, c))[0]
        j = j.rotate(torch.linalg.qr(normal(i, i))[0].unsqueeze(0), q.unsqueeze(0))
    explicit = j.explicit()
    assert j.shape == explicit.shape
    close = lambda x, y: torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    close(j.matrix(), explicit.matrix())
    close(j.square(), explicit.square())
    g = explicit.g[:, :, :, 0]
    close(j.second_moment()[0], torch.einsum("knti,kntj->ij", g, g))
    close(j.squared_columns()[0], g.square().sum((0, 1, 2)))
    close(j.examples(1, 3).matrix(), explicit.matrix()[:, 1:3])
    close(j.cotangents(1, 4).matrix(), explicit.matrix()[1:4])
    close(j.squared_norms(), explicit.squared_norms())
