"""Wrong numbers without an error, as found in other libraries: each must be right here, or raise.

Ids are those of the list the project keeps of such defects: D for any library, S for silent ones of the closest peer.
"""

import copy
import pickle

import pytest
import reference
import torch
from cases import Attention, Head, Unseen, build
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import nngeom as nng

f64 = torch.float64


def normal(*shape):
    return torch.randn(*shape, dtype=f64)


def model_of(*layers):
    torch.manual_seed(3)
    m = nn.Sequential(*layers).double()
    for p in m.parameters():
        p.data.copy_(0.5 * torch.randn(p.shape, dtype=f64))
    return m.eval()


def exact(model, inputs, **options):
    """The dense Fisher, and the diagonal by its own path, against autograd loops."""
    f = reference.fisher(model, inputs)
    loader = [(inputs[: len(inputs) // 2],), (inputs[len(inputs) // 2 :],)]
    torch.testing.assert_close(nng.FIM(model, loader, nng.PMatDense, **options).to_dense(), f, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(
        nng.FIM(model, loader, nng.PMatDiag, **options).diag().flat(), f.diagonal(), rtol=1e-8, atol=1e-12
    )


class Function(nn.Module):
    """A model written as a function of its own parameters."""

    def __init__(self, f, **parameters):
        super().__init__()
        self.f = f
        for name, value in parameters.items():
            setattr(self, name, value if isinstance(value, nn.Module) else nn.Parameter(value))

    def forward(self, *x, **k):
        return self.f(self, *x, **k)


# -- coverage: which parameters are seen -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["reused", "tied", "language-model", "bare", "transformer", "sequence", "weight-norm", "embedding"]
)
def test_d1_s2_d2_d3_d5_d7_d9_d14_d16_every_use_counts(name):
    case = build(name)
    exact(case.model, case.inputs)


def test_d2_s6_tied_weights_count_once():
    case = build("language-model")
    lc = nng.LayerCollection.from_model(case.model)
    assert "head.weight" not in lc and lc.numel == sum(p.numel() for p in case.model.parameters())
    by_alias = nng.LayerCollection.from_model(case.model, include="head.weight")
    assert by_alias.names == ("embed.weight",)


def test_s3_layers_behind_constants_and_second_inputs():
    def f(m, x):
        return m.out(
            torch.tanh(
                m.first(x) + m.constant(torch.ones(len(x), 2, dtype=x.dtype)) + m.table(torch.arange(len(x)) % 3)
            )
        )

    model = Function(
        f, first=nn.Linear(4, 3), constant=nn.Linear(2, 3), table=nn.Embedding(3, 3), out=nn.Linear(3, 3)
    ).double()
    x = normal(6, 4)
    j = torch.cat([reference.jacobian(model, x[:1])] * 1, 1)
    assert j.shape[1] == 1
    lc = nng.LayerCollection.from_model(model)
    v = nng.PVector.randn(lc, dtype=f64)
    dense = nng.FIM(model, [x], nng.PMatDense, likelihood="gaussian")
    h = 1e-5
    before, minus = nng.PVector.from_model(model), None
    (before + h * v).copy_to(model)
    plus = model(x).detach()
    (before - h * v).copy_to(model)
    minus = model(x).detach()
    before.copy_to(model)
    torch.testing.assert_close(dense.vTMv(v), ((plus - minus) / (2 * h)).square().sum() / 6, rtol=1e-6, atol=1e-9)


def test_s4_functional_use_and_functions_without_the_model():
    inner = nn.Linear(4, 3).double()
    model = Function(lambda m, x: F.linear(torch.tanh(x), m.inner.weight, m.inner.bias), inner=inner)
    exact(model, normal(6, 4))
    x = normal(6, 4)
    outside = nng.FIM(model, [x], nng.PMatDense, function=lambda x: x @ inner.weight.T)
    assert outside.trace() > 0


def test_s5_parameters_of_containers_and_parametrizations():
    class Container(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.inner = nn.Parameter(torch.randn(3)), nn.Sequential(nn.Linear(4, 3))

        def forward(self, x):
            return torch.tanh(self.inner(x)) * self.own

    exact(Container().double(), normal(6, 4))

    class Linear(nn.Module):  # another forward under a familiar name
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(normal(3, 4)), nn.Parameter(normal(3))

        def forward(self, x):
            return torch.sin(x @ self.weight.exp().T) + self.bias

    exact(Linear(), normal(6, 4))


def test_spectral_norm_differentiates_its_own_parameter():
    model = (
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))
        .double()
        .eval()
    )
    exact(model, normal(6, 4))


def test_s34_frozen_parameters_are_left_out():
    case = build("frozen")
    lc = nng.LayerCollection.from_model(case.model)
    assert lc.names == ("2.weight", "2.bias") and lc.numel == 15


# -- operations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["conv1d", "conv2d", "conv2d-same", "conv2d-circular", "conv2d-reflect", "depthwise", "deconv2d"]
)
def test_d8_s7_s8_convolutions_as_they_are(name):
    case = build(name)
    exact(case.model, case.inputs)


def test_d8_the_input_factor_of_a_dilated_convolution():
    conv = nn.Conv2d(2, 3, 3, dilation=2, padding=1, bias=False).double()
    x = normal(5, 2, 7, 7)
    m = nng.FIM(nn.Sequential(conv, nn.Flatten(), nn.Linear(75, 3).double()), [x], nng.PMatKFAC)
    patches = F.unfold(x, 3, dilation=2, padding=1)
    expected = torch.einsum("nit,njt->ij", patches, patches) / 5
    factor = next(b.a for lay, b in m.blocks.items() if lay.names == ("0.weight",))
    torch.testing.assert_close(factor[0], expected)


def test_s9_epsilon_of_batch_norm():
    model = model_of(nn.Linear(4, 3), nn.BatchNorm1d(3, eps=0.5))
    exact(model, normal(6, 4))


def test_s10_padding_index_and_unusual_embeddings():
    case = build("embedding")
    exact(case.model, case.inputs)
    ids = torch.randint(0, 6, (6, 4))
    limited = Head(nn.Embedding(6, 3, max_norm=0.5)).double()
    limited(ids)  # renormalises its table in place
    exact(limited, ids)
    by_frequency = Head(nn.Embedding(6, 3, scale_grad_by_freq=True)).double()
    with pytest.raises(nng.NNGeomError):  # its gradient depends on the other examples of the batch
        nng.FIM(by_frequency, [ids], nng.PMatDense)


def test_s11_linear_on_images():
    case = build("image-of-vectors")
    exact(case.model, case.inputs)
    m = nng.FIM(case.model, [case.inputs], nng.PMatImplicit)
    torch.testing.assert_close(m.to_dense(), reference.fisher(case.model, case.inputs), rtol=1e-8, atol=1e-12)


def test_s12_kfac_of_a_sequence_is_that_of_the_equivalent_convolution():
    linear, conv = nn.Linear(3, 2).double(), nn.Conv1d(3, 2, 1).double()
    conv.weight.data, conv.bias.data = linear.weight.data.unsqueeze(-1).clone(), linear.bias.data.clone()
    x = normal(5, 7, 3)
    a = nng.FIM(Function(lambda m, x: m.l(x).sin().sum(1), l=linear), [x], nng.PMatKFAC, likelihood="gaussian")
    b = nng.FIM(
        Function(lambda m, x: m.c(x.transpose(1, 2)).sin().sum(2), c=conv), [x], nng.PMatKFAC, likelihood="gaussian"
    )
    torch.testing.assert_close(a.to_dense(), b.to_dense())


def test_s12_expand_and_reduce_are_exact_where_they_should_be():
    """Deep linear networks: expand when every position has its own loss, reduce when positions are averaged
    (Eschenhagen et al. 2023).
    """
    layer = nn.Linear(3, 2).double()
    x = normal(5, 4, 3)
    every = Function(lambda m, x: m.l(x).flatten(1), l=layer)
    f = nng.FIM(every, [x], nng.PMatDense, likelihood="gaussian").to_dense()
    torch.testing.assert_close(nng.FIM(every, [x], nng.PMatKFAC, likelihood="gaussian", sharing="expand").to_dense(), f)
    mean = Function(lambda m, x: m.l(x).mean(1), l=layer)
    f = nng.FIM(mean, [x], nng.PMatDense, likelihood="gaussian").to_dense()
    torch.testing.assert_close(nng.FIM(mean, [x], nng.PMatKFAC, likelihood="gaussian", sharing="reduce").to_dense(), f)


def test_d11_kfac_of_a_reused_module_counts_both_calls():
    layer = nn.Linear(3, 3, bias=False).double()
    twice = Function(lambda m, x: torch.cat([m.l(x[:, :3]), m.l(x[:, 3:])], 1), l=layer)
    x = normal(5, 6)
    folded = Function(lambda m, x: m.l(x.view(-1, 2, 3)).flatten(1), l=layer)
    a, b = (nng.FIM(m, [x], nng.PMatKFAC, likelihood="gaussian") for m in (twice, folded))
    torch.testing.assert_close(a.to_dense(), b.to_dense())


def test_d13_products_through_attention_kernels():
    class Flash(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)).mean(1)

    model = Flash().double()
    x = normal(4, 5, 4)
    exact(model, x)
    f = reference.fisher(model, x)
    torch.testing.assert_close(nng.FIM(model, [x], nng.PMatImplicit).to_dense(), f, rtol=1e-8, atol=1e-12)


NO_TANGENTS = {
    "no forward mode, no second derivative": (
        lambda: model_of(nn.EmbeddingBag(6, 4, mode="max"), nn.Tanh(), nn.Linear(4, 3)),
        lambda: torch.randint(0, 6, (5, 3)),
    ),
    "activations computed again": (
        lambda: Function(
            lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False).tanh()), a=nn.Linear(4, 5), b=nn.Linear(5, 3)
        ).double(),
        lambda: normal(5, 4),
    ),
    "channels-last group norm": (
        lambda: model_of(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
        lambda: normal(5, 2, 3, 3).to(memory_format=torch.channels_last),
    ),
}


@pytest.mark.parametrize("name", NO_TANGENTS)
def test_products_where_forward_mode_fails(name):
    """torch's forward mode lacks some operations and fails on others; products then are taken from explicit rows."""
    make, draw = NO_TANGENTS[name]
    model, x = make(), draw()
    y = torch.zeros(len(x), dtype=torch.long)
    m = nng.FIM(model, [(x[:2],), (x[2:],)], nng.PMatImplicit)
    torch.testing.assert_close(m.to_dense(), reference.fisher(model, x), rtol=1e-8, atol=1e-12)
    implicit, dense = (
        nng.GradientCovariance(model, [(x[:2], y[:2]), (x[2:], y[2:])], k, loss="cross_entropy")
        for k in (nng.PMatImplicit, nng.PMatDense)
    )
    torch.testing.assert_close(implicit.to_dense(), dense.to_dense(), rtol=1e-8, atol=1e-12)


class Bags(nn.Module):
    """Bags of embeddings in every form, summed: padded means, weighted sums, bags by their starts; ``lookups``: the
    same by indexing.
    """

    def __init__(self):
        super().__init__()
        self.lookups = False
        self.table, self.head = nn.Parameter(torch.randn(6, 4, dtype=f64)), nn.Linear(4, 3, dtype=f64)
        self.mean = nn.EmbeddingBag(6, 4, padding_idx=2, dtype=f64)

    def forward(self, x):
        weights, starts = (
            torch.linspace(0.5, 1.5, x.shape[1], dtype=f64).expand(x.shape),
            torch.arange(len(x)) * x.shape[1],
        )
        if self.lookups:
            kept = (x != 2).unsqueeze(2)
            means = (self.mean.weight[x] * kept).sum(1) / kept.sum(1).clamp_min(1)
            return self.head((means + (self.table[x] * (weights + 1).unsqueeze(2)).sum(1)).tanh())
        whole = self.mean(x) + F.embedding_bag(x, self.table, mode="sum", per_sample_weights=weights)
        return self.head((whole + F.embedding_bag(x.flatten(), self.table, starts, mode="sum")).tanh())


def test_bags_of_embeddings_have_second_derivatives():
    model, x = Bags(), torch.randint(0, 6, (4, 3))
    y = torch.arange(4) % 3
    j = reference.jacobian(model, x)
    v = nng.PVector.randn(nng.LayerCollection.from_model(model), dtype=f64)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    close(nng.Jacobian(model, [x], nng.PushForwardImplicit).mv(v).tensor, j @ v.flat())
    h = nng.Hessian(model, [(x, y)], nng.PMatDense, loss="cross_entropy").to_dense()
    model.lookups = True
    close(reference.jacobian(model, x), j)
    close(h, reference.hessian(model, x, y, F.cross_entropy))
    plain = nn.Sequential(nn.EmbeddingBag(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    k = nng.GramMatrix(plain, [x], differentiable=True)
    close(k.to_dense(), nng.GramMatrix(plain, [x]).to_dense())
    grads = torch.autograd.grad(k.trace(), list(plain.parameters()), allow_unused=True)
    table = plain[0].weight
    with torch.no_grad():
        ends = []
        for step in (1e-5, -2e-5):
            table[x[0, 0], 1] += step
            ends.append(nng.GramMatrix(plain, [x]).trace())
    torch.testing.assert_close(grads[0][x[0, 0], 1], (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_maps_on_channels_last_group_norm():
    """torch's forward mode of group norm fails on channels-last tensors: double backward instead."""
    make, draw = NO_TANGENTS["channels-last group norm"]
    model, x = make(), draw()
    v = nng.PVector.randn(nng.LayerCollection.from_model(model), dtype=f64)
    a, b = (nng.Jacobian(model, [x], kind).mv(v).flat() for kind in (nng.PushForwardImplicit, nng.PushForwardDense))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    a, b = (
        nng.GramMatrix(model, [x], kind).mv(nng.FVector(torch.ones(3, 5, dtype=f64))).flat()
        for kind in (nng.FMatImplicit, nng.FMatDense)
    )
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_sparse_embeddings():
    model = model_of(nn.Embedding(6, 3, sparse=True), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))
    dense = model_of(nn.Embedding(6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))
    x, y = torch.randint(0, 6, (5, 2)), torch.zeros(5, dtype=torch.long)
    for kind in (nng.PMatDense, nng.PMatKFAC, nng.PMatImplicit):
        torch.testing.assert_close(nng.FIM(model, x, kind).to_dense(), nng.FIM(dense, x, kind).to_dense())
    a, b = (nng.Hessian(m, (x, y), nng.PMatDense, loss="cross_entropy").to_dense() for m in (model, dense))
    torch.testing.assert_close(a, b)


def test_one_example_without_an_axis_of_examples():
    with pytest.raises(nng.OutputError, match=r"one example without an axis.*unsqueeze\(0\)"):
        nng.FIM(nn.Linear(3, 3).double(), [(normal(3),)], nng.PMatDense, likelihood="gaussian")


def test_products_keep_the_errors_of_the_model():
    def f(m, x):
        if bool((x > 50).any()):
            raise RuntimeError("no numbers above 50")
        return m.l(x)

    x = normal(4, 4)
    m = nng.FIM(Function(f, l=nn.Linear(4, 3)).double(), [x], nng.PMatImplicit)
    x += 100
    with pytest.raises(RuntimeError, match="above 50"):
        m.mv(nng.PVector.randn(m.layer_collection, dtype=f64))


# -- losses and likelihoods --------------------------------------------------------------------------------------------


def test_d10_class_weights_and_ignore_index_reach_kfac():
    layer = nn.Linear(4, 3).double()
    x, y = normal(1, 4), torch.tensor([2])
    loss = nng.CrossEntropy(weight=torch.tensor([0.2, 3.0, 5.0]))
    dense, kfac = (nng.GGN(layer, [(x, y)], r, loss=loss).to_dense() for r in (nng.PMatDense, nng.PMatKFAC))
    plain = nng.GGN(layer, [(x, y)], nng.PMatDense, loss="cross_entropy").to_dense()
    torch.testing.assert_close(kfac, dense)
    torch.testing.assert_close(dense, 5 * plain)
    ignored = nng.GGN(layer, [(x, torch.tensor([-100]))], nng.PMatKFAC, loss="cross_entropy")
    assert ignored.trace() == 0


def test_d12_s16_token_outputs_normalise_over_classes():
    model = nn.Linear(4, 5).double()
    x, y = normal(3, 6, 4), torch.randint(0, 5, (3, 6))
    y[0, 2:] = -100
    m = nng.FIM(model, [(x, y)], nng.PMatEKFAC, likelihood=nng.Categorical(dim=-1))
    dense = nng.FIM(model, [(x, y)], nng.PMatDense, likelihood=nng.Categorical(dim=-1)).to_dense()
    total = 0
    for i in range(3):
        j = reference.jacobian(model, x[i : i + 1])[:, 0].view(6, 5, -1)
        for t in range(6):
            if y[i, t] != -100:
                total = total + reference.sandwich(j[t].unsqueeze(1), reference.softmax_metric(model(x[i, t][None])))
    torch.testing.assert_close(dense, total / 3)
    torch.testing.assert_close(m.trace(), dense.trace())
    inferred = nng.FIM(model, [(x, y)], nng.PMatDense).to_dense()  # labels (n, t) leave one axis for the classes
    torch.testing.assert_close(inferred, dense)
    for batch in (x, (x[:, :5], y[:, :5])):  # no labels; as many positions as classes
        with pytest.raises(nng.OutputError, match="Categorical"):
            nng.FIM(model, [batch], nng.PMatDiag)


def test_s17_monte_carlo_gaussian_scales_with_the_inverse_variance():
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


def test_s18_s19_monte_carlo_is_one_matrix():
    case = build("mlp")
    m = nng.FIM_MonteCarlo(case.model, case.loader, nng.PMatImplicit, samples=2)
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    assert torch.equal(m.mv(v).flat(), m.mv(v).flat())
    torch.testing.assert_close(m.vTMv(v), v.dot(m.mv(v)))
    seed = lambda: torch.Generator().manual_seed(5)
    one = nng.FIM_MonteCarlo(case.model, [case.inputs], nng.PMatDense, samples=3, generator=seed()).to_dense()
    many = nng.FIM_MonteCarlo(
        case.model, [(x,) for x in case.inputs.split(2)], nng.PMatDense, samples=3, generator=seed()
    ).to_dense()
    implicit = nng.FIM_MonteCarlo(case.model, case.loader, nng.PMatImplicit, samples=3, generator=seed()).to_dense()
    torch.testing.assert_close(one, many)
    torch.testing.assert_close(one, implicit)


# -- loaders -----------------------------------------------------------------------------------------------------------


def test_s13_the_count_is_of_examples_seen():
    case = build("mlp")
    data = TensorDataset(case.inputs, case.targets)
    loader = DataLoader(data, batch_size=3, drop_last=True)
    m = nng.FIM(case.model, loader, nng.PMatDense)
    assert m.examples == 6
    torch.testing.assert_close(m.to_dense(), reference.fisher(case.model, case.inputs[:6]))
    sampler = DataLoader(data, batch_sampler=[[0, 1], [4]])
    torch.testing.assert_close(
        nng.FIM(case.model, sampler, nng.PMatDense).to_dense(), reference.fisher(case.model, case.inputs[[0, 1, 4]])
    )


@pytest.mark.parametrize("kind", ["list", "generator", "iterable", "dict", "tensors", "pair", "shuffled"])
@pytest.mark.parametrize("representation", [nng.PMatDense, nng.PMatEKFAC])
def test_loaders_of_every_kind(kind, representation):
    case = build("mlp")

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(case.inputs, case.targets))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = case.model

        def forward(self, pixels):
            return self.net(pixels)

    loaders = {
        "list": case.loader,
        "generator": (b for b in case.loader),
        "iterable": DataLoader(Stream(), batch_size=4),
        "dict": [{"pixels": x, "labels": y} for x, y in case.loader],
        "tensors": [x for x, _ in case.loader],
        "pair": (case.inputs, case.targets),
        "shuffled": DataLoader(TensorDataset(case.inputs, case.targets), batch_size=3, shuffle=True),
    }
    model = Net() if kind == "dict" else case.model
    want = nng.FIM(case.model, [case.inputs], representation).to_dense()
    torch.testing.assert_close(nng.FIM(model, loaders[kind], representation).to_dense(), want)


def test_s1_kernels_of_shuffled_loaders_are_symmetric():
    case = build("mlp")
    loader = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=3, shuffle=True)
    k = nng.GramMatrix(case.model, loader).to_dense()
    torch.testing.assert_close(k, k.T)
    assert torch.linalg.eigvalsh(k).min() > -1e-10 * k.norm()
    want = nng.GramMatrix(case.model, [case.inputs]).to_dense()
    torch.testing.assert_close(torch.linalg.eigvalsh(k), torch.linalg.eigvalsh(want))


def test_s15_centring_does_not_cancel():
    x = 1e4 + torch.randn(8, 5)
    model = nn.Linear(5, 1, bias=False)
    k = nng.GramMatrix(model, [x], centered=True).to_dense().double()
    rows = (x - x.mean(0)).double()
    assert (k - rows @ rows.T).norm() / (rows @ rows.T).norm() < 1e-2
    assert torch.linalg.eigvalsh(k).min() > -1e-2 * k.norm()
    for kind in (nng.FMatDiag, nng.FMatBlockDiag):
        trace = nng.GramMatrix(model, [x[:5], x[5:]], kind, centered=True).trace()
        torch.testing.assert_close(trace.double(), rows.square().sum(), rtol=1e-2, atol=0)


def test_s14_an_exception_leaves_nothing_behind():
    case = build("mlp")
    calls = []

    def fails_once(x, y):
        calls.append(1)
        if len(calls) == 4:  # the second batch
            raise ValueError("the user's own")
        return case.model(x)

    with pytest.raises(ValueError, match="own"):
        nng.FIM(case.model, case.loader, nng.PMatDense, function=fails_once)
    torch.testing.assert_close(
        nng.FIM(case.model, case.loader, nng.PMatDense).to_dense(), reference.fisher(case.model, case.inputs)
    )


def test_progress_is_shown_when_asked(capsys):
    case = build("mlp")
    nng.FIM(case.model, case.loader, nng.PMatDiag)
    assert capsys.readouterr().err == ""
    nng.FIM(case.model, case.loader, nng.PMatDiag, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_s36_inputs_are_left_alone():
    case = build("mlp")
    x = case.inputs
    nng.FIM(case.model, [x], nng.PMatKFAC)
    assert not x.requires_grad and x.grad is None


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.BatchNorm1d(4), nn.AlphaDropout(0.1), nn.BatchNorm1d(4, track_running_stats=False)]
)
def test_s19_s20_random_and_mixing_modes_raise(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3)).train()
    for p in layer.parameters():
        p.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(nng.ModeError, match=r"model\.eval\(\)"):
        nng.FIM(model, [torch.randn(5, 4)], nng.PMatDiag)
    assert all(
        torch.equal(v, state[k]) for k, v in model.state_dict().items() if "num_batches" not in k and "running" not in k
    )


def test_attention_dropout_raises_and_training_mode_without_dropout_is_fine():
    with pytest.raises(nng.ModeError, match="dropout"):
        nng.FIM(Attention(dropout=0.1).train(), [torch.randn(3, 4, 4)], nng.PMatDiag)
    model = Attention().double().train()
    exact(model, normal(4, 3, 4))


def test_mixing_examples_raises():
    model = Function(lambda m, x: m.l(x - x.mean(0)), l=nn.Linear(4, 3).double())
    with pytest.raises(nng.CoverageError, match="mixes"):
        nng.FIM(model, [normal(5, 4)], nng.PMatDense)
    cell = Function(lambda m, x: m.c(x)[0][:, -1] + x.mean(), c=nn.GRU(3, 3, batch_first=True).double())
    with pytest.raises(nng.CoverageError, match="mixes"):
        nng.FIM(cell, [normal(5, 2, 3)], nng.PMatDense)


# -- algebra -----------------------------------------------------------------------------------------------------------


def test_d4_operations_of_dense_kernels():
    case = build("mlp")
    k = nng.GramMatrix(case.model, case.loader)
    dense, f = k.to_dense(), nng.FVector(torch.randn(3, case.n, dtype=f64))
    torch.testing.assert_close(k.trace(), dense.trace())
    torch.testing.assert_close(k.mv(f).flat(), dense @ f.flat())
    torch.testing.assert_close((k + 2 * k - k).to_dense(), 2 * dense)


def test_d6_the_eigenvalue_corrected_optimizer_moves_along_the_solve():
    case = build("mlp")
    optimizer = nng.optim.EKFAC(case.model, lr=1.0, momentum=0.0, damping=0.1, basis_every=1, scalings="batch")
    before = nng.PVector.from_model(case.model)
    fisher = nng.EmpiricalFIM(case.model, [(case.inputs, case.targets)], nng.PMatEKFAC, loss="cross_entropy")
    with optimizer.observe():
        F.cross_entropy(case.model(case.inputs), case.targets).backward()
    gradient = nng.PVector.from_grad(case.model)
    optimizer.step()
    step = before - nng.PVector.from_model(case.model)
    torch.testing.assert_close(step.flat(), fisher.solve(gradient, 0.1).flat())
    assert step.dot(gradient) / (step.norm() * gradient.norm()) < 0.999


def test_d15_spatially_uncorrelated_activations():
    case = build("conv2d")
    f = nng.FIM(case.model, case.loader, nng.PMatBlockDiag).to_dense()
    kfac, ekfac = (nng.FIM(case.model, case.loader, r, sua=True) for r in (nng.PMatKFAC, nng.PMatEKFAC))
    torch.testing.assert_close(ekfac.trace(), f.trace())
    assert (ekfac.to_dense() - f).norm() <= (kfac.to_dense() - f).norm() * (1 + 1e-9)


def test_s21_low_rank_solve_off_its_range():
    case = build("mlp")
    m, f = nng.FIM(case.model, case.loader, nng.PMatLowRank), reference.fisher(case.model, case.inputs)
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    want = torch.linalg.solve(f + 0.3 * torch.eye(len(f), dtype=f64), v.flat())
    torch.testing.assert_close(m.solve(v, 0.3).flat(), want)


def test_s22_norm_of_a_negative_matrix():
    m = nng.FIM(build("mlp").model, build("mlp").loader, nng.PMatEKFAC)
    torch.testing.assert_close((-1 * m).norm(), m.norm())


def test_s23_sums_and_products_of_different_kinds():
    case = build("mlp")
    a, b = (nng.FIM(case.model, case.loader, r) for r in (nng.PMatDense, nng.PMatDiag))
    da, db = a.to_dense(), b.to_dense()
    torch.testing.assert_close((a + b).to_dense(), da + db)
    torch.testing.assert_close((b - a).to_dense(), db - da)
    torch.testing.assert_close((b @ a).to_dense(), db @ da)
    total = 2 * (a + b)
    v = nng.PVector.randn(a.layer_collection, dtype=f64)
    torch.testing.assert_close(
        total.solve(v, 0.1).flat(), torch.linalg.solve(2 * (da + db) + 0.1 * torch.eye(len(da), dtype=f64), v.flat())
    )
    torch.testing.assert_close(total.trace(), 2 * (da + db).trace())
    torch.testing.assert_close(total.diag().flat(), 2 * (da + db).diagonal())
    torch.testing.assert_close(total.norm(), 2 * (da + db).norm())
    torch.testing.assert_close(
        (b @ a).solve(v, 0.2).flat(), torch.linalg.solve(db @ da + 0.2 * torch.eye(len(da), dtype=f64), v.flat())
    )


def test_s24_s25_s31_matrices_are_frozen():
    case = build("mlp")
    m = nng.FIM(case.model, case.loader, nng.PMatDense)
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    before = m.solve(v, 0.1).flat()
    changed = 2 * m
    torch.testing.assert_close(changed.solve(v, 0.2).flat(), before / 2)
    assert torch.equal(m.solve(v, 0.1).flat(), before)
    with pytest.raises(AttributeError):
        m.examples = 3
    ekfac = nng.FIM(case.model, case.loader, nng.PMatEKFAC)
    inverse = ekfac.inverse(0.1)
    again = ekfac.rescaled(case.model, case.loader)
    torch.testing.assert_close(again.to_dense(), ekfac.to_dense())
    torch.testing.assert_close(inverse.mv(v).flat(), ekfac.solve(v, 0.1).flat())
    torch.testing.assert_close((3 * ekfac).mv(v).flat(), 3 * ekfac.mv(v).flat())


def test_s30_indefinite_matrices_keep_their_sign():
    case = build("mlp")
    a, b = (nng.FIM(case.model, [x], nng.PMatDense) for x, _ in case.loader)
    difference = a - b
    values, basis = difference.eigh()
    u = basis.to_dense()
    assert values.min() < 0
    torch.testing.assert_close(u @ values.diag() @ u.T, difference.to_dense())


def test_s26_norms_of_vectors():
    lc = nng.LayerCollection.from_model(build("mlp").model)
    v = nng.PVector.randn(lc, dtype=f64)
    for p in (1, 2, 3, float("inf")):
        torch.testing.assert_close(v.norm(p), torch.linalg.vector_norm(v.flat(), p))


def test_s27_s37_collections_differ_by_order_and_content():
    model = build("mlp").model
    whole = nng.LayerCollection.from_model(model)
    part = nng.LayerCollection.from_model(model, include="0")
    turned = nng.LayerCollection(whole.names[::-1], whole.shapes[::-1], whole.layers[::-1])
    assert (
        whole != part
        and whole != turned
        and whole != None  # noqa: E711
        and hash(whole) == hash(nng.LayerCollection.from_model(model))
    )
    m = nng.FIM(model, build("mlp").loader, nng.PMatKFAC, layer_collection=part)
    with pytest.raises(nng.CollectionError, match="another collection"):
        m.mv(nng.PVector.randn(whole, dtype=f64))
    with pytest.raises(nng.CollectionError, match="order"):
        nng.PVector.randn(whole) + nng.PVector.randn(turned)
    with pytest.raises(nng.CollectionError):
        nng.PVector.randn(part) + nng.PVector.randn(whole)


def test_s28_float64_models_under_the_float32_default():
    case = build("layer-norm")
    for r in (nng.PMatDiag, nng.PMatBlockDiag, nng.PMatEKFAC, nng.PMatImplicit):
        m = nng.FIM(case.model, case.loader, r)
        assert m.dtype == f64 and m.mv(nng.PVector.randn(m.layer_collection)).dtype == f64 and m.to_dense().dtype == f64


def test_layers_of_different_dtypes():
    """One matrix has one dtype, the widest of its layers; no layer is rounded to that of another."""
    x = normal(6, 3)
    whole = model_of(nn.Linear(3, 4), nn.Linear(4, 3))
    model = nn.Sequential(nn.Linear(3, 4).float(), nn.Linear(4, 3).double())
    model[0].load_state_dict(whole[0].state_dict()), model[1].load_state_dict(whole[1].state_dict())
    whole[0].load_state_dict(model[0].state_dict())
    f = lambda m, d: lambda a: m[1](m[0](a.to(d)).double().tanh())
    v = nng.PVector.randn(nng.LayerCollection.from_model(whole), generator=torch.Generator().manual_seed(0), dtype=f64)
    for kind in (
        nng.PMatDense,
        nng.PMatBlockDiag,
        nng.PMatKFAC,
        nng.PMatEKFAC,
        nng.PMatLowRank,
        nng.PMatQuasiDiag,
        nng.PMatDiag,
        nng.PMatEye,
    ):
        a, b = (
            nng.FIM(model, (x,), kind, function=f(model, torch.float32)),
            nng.FIM(whole, (x,), kind, function=f(whole, f64)),
        )
        assert a.dtype == f64 and {
            t.dtype for block in a.blocks.values() for t in block.fields().values() if isinstance(t, torch.Tensor)
        } == {f64}
        torch.testing.assert_close(a.mv(v).flat(), b.mv(v).flat(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a.solve(v, 0.1).flat(), b.solve(v, 0.1).flat(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.diag()["1.weight"], b.diag()["1.weight"], rtol=1e-5, atol=1e-8)


def test_s29_half_precision_accumulates_in_float32():
    model = nn.Linear(1, 2, bias=False).to(torch.bfloat16)
    model.weight.data.zero_()
    x = torch.ones(3000, 1, dtype=torch.bfloat16)
    for r in (nng.PMatDiag, nng.PMatKFAC, nng.PMatEKFAC, nng.PMatDense):
        m = nng.FIM(model, list(x.split(30)), r)
        assert m.dtype == torch.float32
        torch.testing.assert_close(m.trace(), torch.tensor(0.5), rtol=1e-2, atol=0)
    half = nn.Linear(4, 2).half()
    big = nng.FIM(half, [300 * torch.ones(5, 4, dtype=torch.float16)], nng.PMatDiag, likelihood="gaussian")
    torch.testing.assert_close(big.diag().flat()[0], torch.tensor(300.0**2))


def test_s32_vectors_are_copies():
    model = build("mlp").model
    before = model[0].weight.detach().clone()
    v = nng.PVector.from_model(model)
    v.flat().add_(1)
    assert torch.equal(model[0].weight, before)
    only = nn.Linear(3, 1, bias=False)
    before = only.weight.detach().clone()
    nng.PVector.from_model(only).flat().add_(1)
    assert torch.equal(only.weight, before)


def test_s33_unconverged_solves_raise():
    case = build("mlp")
    m = nng.FIM(case.model, case.loader, nng.PMatImplicit)
    with pytest.raises(nng.ConvergenceError, match="residual"):
        m.solve(nng.PVector.randn(m.layer_collection, dtype=f64), 1e-6, max_iter=1)


@pytest.mark.parametrize("representation", [nng.PMatDense, nng.PMatKFAC, nng.PMatImplicit])
def test_s35_empty_loaders_raise(representation):
    with pytest.raises(nng.LoaderError, match="empty"):
        nng.FIM(build("mlp").model, [], representation)


def test_d17_eigenvectors_are_contiguous():
    from nngeom.core import linalg

    x = normal(5, 5)
    assert linalg.eigh(x @ x.T)[1].is_contiguous()


# -- crashes that should work ------------------------------------------------------------------------------------------


def test_channels_last_and_strided_tensors():
    model = model_of(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 3)).to(
        memory_format=torch.channels_last
    )
    x = normal(6, 2, 4, 4).to(memory_format=torch.channels_last)
    exact(model, x)
    v = nng.PVector.from_model(model)
    assert torch.equal(v["0.weight"], model[0].weight)
    transposed = Function(lambda m, x: m.l(x).T.contiguous().T, l=nn.Linear(4, 3).double())
    exact(transposed, normal(4, 6).T)


def test_norms_without_affine_and_scalars():
    exact(model_of(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 3)), normal(6, 4))
    exact(model_of(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.PReLU(), nn.Linear(4, 3)), normal(6, 4))


@pytest.mark.parametrize("shape", [(6,), (6, 2, 2)])
def test_embeddings_of_several_index_shapes(shape):
    model = Function(
        lambda m, x: m.h(m.e(x).reshape(len(x), -1, 3).sin().sum(1)), e=nn.Embedding(5, 3), h=nn.Linear(3, 3)
    ).double()
    exact(model, torch.randint(0, 5, shape))


def test_integer_inputs_and_keyword_arguments():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 3)

        def forward(self, ids, scale=1.0):
            return torch.nn.functional.linear(
                input=ids.to(self.l.weight.dtype) * scale, weight=self.l.weight, bias=self.l.bias
            )

    exact(Net().double(), torch.randint(0, 3, (6, 4)))


def test_head_only_on_a_frozen_backbone():
    def f(m, x):
        with torch.no_grad():
            h = torch.tanh(m.body(x))
        return m.head(h)

    model = Function(f, body=nn.Linear(4, 3), head=nn.Linear(3, 3)).double()
    lc = nng.LayerCollection.from_model(model, include="head")
    m = nng.FIM(model, [normal(5, 4)], nng.PMatEKFAC, layer_collection=lc)
    assert m.shape == (12, 12) and m.trace() > 0
    whole = nng.FIM(model, [normal(5, 4)], nng.PMatDense)  # the body has zero gradient
    assert whole.diag()["body.weight"].abs().sum() == 0


def test_dead_units_have_finite_inverses():
    model = model_of(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    model[0].bias.data.fill_(-100)
    m = nng.FIM(model, [normal(6, 4)], nng.PMatKFAC)
    v = nng.PVector.randn(m.layer_collection, dtype=f64)
    for damping in (1e-3, nng.FactoredTikhonov(1e-3), nng.Cutoff(1e-6)):
        assert bool(torch.isfinite(m.solve(v, damping).flat()).all())
    assert m.logdet() == -torch.inf
    with pytest.raises(nng.SingularError, match="damping"):
        m.solve(v)


def test_saturated_softmax_is_finite():
    model = model_of(nn.Linear(4, 3))
    m = nng.FIM(model, [1e4 * normal(6, 4)], nng.PMatDense)
    assert bool(torch.isfinite(m.to_dense()).all())


def test_non_finite_inputs_name_the_examples():
    x = normal(6, 4)
    x[4] = float("nan")
    with pytest.raises(nng.NonFiniteError, match=r"batch 0 .*examples \[4\]"):
        nng.FIM(build("mlp").model, [x], nng.PMatDiag)


def test_the_model_may_be_compiled_or_wrapped():
    case = build("mlp")
    f = reference.fisher(case.model, case.inputs)
    for wrapped in (torch.compile(case.model, backend="eager"), nn.DataParallel(case.model)):
        m = nng.FIM(wrapped, case.loader, nng.PMatDense)
        torch.testing.assert_close(m.to_dense(), f)
        assert m.layer_collection.names[0] == "0.weight"


def test_the_model_may_be_distributed(tmp_path):
    import torch.distributed as dist

    case = build("mlp")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(case.model)
        m = nng.FIM(wrapped, case.loader, nng.PMatDense)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(m.to_dense(), reference.fisher(case.model, case.inputs))


@pytest.mark.parametrize(
    "representation", [nng.PMatDiag, nng.PMatKFAC, nng.PMatEKFAC, nng.PMatLowRank, nng.PMatImplicit]
)
def test_autocast_is_half_precision_near_the_truth(representation):
    model, x = model_of(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).float(), torch.randn(10, 6)
    exact_m = nng.FIM(model, [x], representation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m = nng.FIM(model, [x], representation)
    assert m.dtype == torch.float32
    torch.testing.assert_close(m.trace(), exact_m.trace(), rtol=0.03, atol=0)


def test_gradients_may_be_switched_off_and_inputs_may_carry_a_graph():
    case = build("mlp")
    f = reference.fisher(case.model, case.inputs)
    with torch.no_grad():
        torch.testing.assert_close(nng.FIM(case.model, case.loader, nng.PMatDense).to_dense(), f)
    with torch.inference_mode():
        torch.testing.assert_close(nng.FIM(case.model, case.loader, nng.PMatDense).to_dense(), f)
    x = case.inputs.clone().requires_grad_() * 1
    torch.testing.assert_close(nng.FIM(case.model, [x], nng.PMatDense).to_dense(), f)


def test_every_matrix_pickles_and_outlives_the_model():
    case = build("conv2d")
    for r in (nng.PMatDense, nng.PMatEKFAC, nng.PMatMixed({"*bias": nng.PMatDiag}, default=nng.PMatKFAC), nng.PMatEye):
        m = nng.FIM(case.model, case.loader, r)
        copy = pickle.loads(pickle.dumps(m))
        v = nng.PVector.randn(m.layer_collection, dtype=f64)
        assert torch.equal(copy.solve(v, 0.1).flat(), m.solve(v, 0.1).flat())


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_a_large_table_of_positions_keeps_its_structure():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Parameter(0.1 * normal(1, 70, 60)), nn.Linear(60, 3)

        def forward(self, x):
            return self.head(torch.tanh(x + self.table).mean(1))

    model, x = Model().double(), normal(3, 70, 60)
    assert nng.explain(model, x)["table"].structure == "lookup"
    f = reference.fisher(model, x)
    torch.testing.assert_close(nng.FIM(model, [x], nng.PMatDiag).diag().flat(), f.diagonal(), rtol=1e-8, atol=1e-14)
    kfac, ekfac = (nng.FIM(model, [x], r) for r in (nng.PMatKFAC, nng.PMatEKFAC))
    torch.testing.assert_close(ekfac.trace(), f.trace())
    assert kfac.nbytes() < 8 * 70 * 60 * 60


def test_a_factor_above_the_limit_is_kept_diagonal():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 10_050, bias=False)).double()
    x = normal(4, 3)
    kfac = nng.FIM_MonteCarlo(model, [x], nng.PMatKFAC, samples=2, generator=torch.Generator().manual_seed(0))
    big = next(b for lay, b in kfac.blocks.items() if lay.names == ("2.weight",))
    assert big.g.shape == (1, 10_050)
    diag = nng.FIM_MonteCarlo(model, [x], nng.PMatDiag, samples=2, generator=torch.Generator().manual_seed(0))
    ekfac = nng.FIM_MonteCarlo(model, [x], nng.PMatEKFAC, samples=2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ekfac.trace(), diag.trace())
    v = nng.PVector.randn(kfac.layer_collection, dtype=f64)
    torch.testing.assert_close(kfac.solve(kfac.mv(v) + 0.1 * v, 0.1).flat(), v.flat())


def test_eigendecompositions_survive_a_failure_of_lapack(monkeypatch):
    from nngeom.core import linalg

    x = normal(6, 6)
    m, calls, fails, eigh = x @ x.T, [], [0], torch.linalg.eigh

    def failing(a):
        calls.append(1)
        if len(calls) <= fails[0]:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(a)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    for count in (1, 2):
        fails[0] = count
        calls.clear()
        values, vectors = linalg.eigh(m)
        torch.testing.assert_close((vectors * values) @ vectors.T, m, rtol=1e-8, atol=1e-8)
        assert bool((values.diff() >= 0).all())


# -- what a few examples could hide ------------------------------------------------------------------------------------


class Sorted(nn.Module):
    """Sorts its examples before a layer and puts them back behind it, as packing by length does."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        order = x.square().flatten(1).sum(1).argsort()
        inner = torch.tanh(self.inner(h[order]))
        return self.last(inner[order.argsort()]).flatten(1)


class ByBatchSize(nn.Module):
    """The same function by two routes; the one of larger batches uses a weight once more than can be seen."""

    def __init__(self, extra: bool):
        super().__init__()
        self.first, self.again, self.extra = nn.Linear(4, 4), nn.Linear(4, 3), extra

    def forward(self, x):
        h = torch.tanh(self.first(x))
        w = self.first.weight
        if self.extra and len(x) > 3:
            h = h + Unseen.apply(x, w)
        elif self.extra:
            h = h + F.linear(x, w)
        return self.again(h)


@pytest.mark.parametrize(("shape", "check"), [((7, 4), True), ((7, 7, 4), True), ((7, 2, 4), True), ((7, 7, 4), False)])
def test_a_model_that_sorts_its_examples(shape, check):
    """Without the check the order is proved only where shapes leave a choice."""
    torch.manual_seed(0)
    model, x = Sorted().double(), normal(*shape)
    torch.testing.assert_close(nng.Jacobian(model, [x], check=check).tensor, reference.jacobian(model, x))


@pytest.mark.parametrize("extra", [True, False])
def test_a_model_whose_route_depends_on_the_size_of_the_batch(extra):
    torch.manual_seed(0)
    model, x = ByBatchSize(extra).double(), normal(9, 4)
    torch.testing.assert_close(nng.Jacobian(model, [x]).tensor, reference.jacobian(model, x))


def test_kernels_and_rows_of_layers_in_two_dtypes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.conv, self.wide = nn.Linear(4, 5), nn.Conv1d(1, 2, 2), nn.Linear(5, 3).double()

        def forward(self, x):
            return self.wide(
                torch.tanh(self.narrow(x) + self.conv(x.unsqueeze(1)).flatten(1).sum(1, keepdim=True)).double()
            )

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(6, 4)
    rows = reference.jacobian(copy.deepcopy(model).double(), x.double())
    torch.testing.assert_close(nng.Jacobian(model, [x]).tensor.double(), rows, rtol=1e-4, atol=1e-5)
    kernel = torch.einsum("cnd,emd->cnem", rows, rows)
    torch.testing.assert_close(nng.GramMatrix(model, [x]).tensor.double(), kernel, rtol=1e-4, atol=1e-4)


class Root(nn.Module):
    """Finite outputs whose gradient in the first layer is infinite where its output is zero."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3, bias=False, dtype=f64), nn.Linear(3, 2, dtype=f64)

    def forward(self, x):
        return self.second(self.first(x).abs().sqrt())


RESULTS = {
    "fisher": lambda m, x: nng.FIM(m, x, nng.PMatDense),
    "kfac": lambda m, x: nng.FIM(m, x, nng.PMatKFAC),
    "ekfac": lambda m, x: nng.FIM(m, x, nng.PMatEKFAC),
    "diagonal": lambda m, x: nng.FIM(m, x, nng.PMatDiag),
    "kernel": lambda m, x: nng.GramMatrix(m, x),
    "columns": lambda m, x: nng.GramMatrix(m, x[:1], other=x),
    "squared norms": lambda m, x: nng.GramMatrix(m, x, nng.FMatDiag),
    "blocks": lambda m, x: nng.GramMatrices(m, x, nng.FMatBlockDiag),
    "rows": lambda m, x: nng.Jacobian(m, x),
    "implicit": lambda m, x: nng.GramMatrix(m, x[::-1], nng.FMatImplicit),
}


@pytest.mark.parametrize("result", RESULTS)
def test_gradients_that_are_not_finite_are_found_in_every_result(result):
    x = normal(8, 4)
    x[6] = 0
    with pytest.raises(nng.NonFiniteError, match=r"'first'.*batch \d, examples \[2\]"):
        RESULTS[result](Root(), [(x[:4],), (x[4:],)])


def test_solves_by_products_raise_where_gradients_are_not_finite():
    x = torch.zeros(4, 4, dtype=f64)
    m = nng.FIM(Root(), [x], nng.PMatImplicit)
    with pytest.raises(nng.NonFiniteError, match="met NaN"):
        m.solve(nng.PVector.randn(m.layer_collection, dtype=f64), 0.1)


def test_solves_by_products_raise_where_the_vector_is_not_finite():
    case = build("mlp")
    m = nng.FIM(case.model, case.loader, nng.PMatImplicit)
    with pytest.raises(nng.NonFiniteError, match="met NaN"):
        m.solve(nng.PVector.from_model(case.model) * float("nan"), 0.1)
