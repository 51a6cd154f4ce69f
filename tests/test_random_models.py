"""Random small networks composed from everything the engine knows, against autograd loops."""

import copy
import warnings

import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import nngeom as nng

FEATURES = 3


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(-1, -2)


class TimeFirst(nn.Module):
    """Any layer applied with positions in front."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(0, 1).contiguous()).transpose(0, 1)


class Folded(nn.Module):
    """Any layer applied with positions folded into examples."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class Affine(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.w, self.b = form, nn.Parameter(torch.empty(FEATURES)), nn.Parameter(torch.empty(FEATURES))

    def forward(self, x):
        if self.form == "mul-add":
            return x * self.w + self.b
        if self.form == "rms":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * self.w - self.b
        return self.w.exp() * x + self.b.sin()  # unusual: the fallback


class SelfAttention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.m, self.batch_first = nn.MultiheadAttention(FEATURES, 1, batch_first=batch_first), batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.m(x, x, x)[0]
        return y if self.batch_first else y.transpose(0, 1)


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def conv(channels, groups, dilation, padding, mode):
    return nn.Sequential(
        Transpose(),
        nn.Conv1d(channels, channels, 2, dilation=dilation, padding=padding, padding_mode=mode, groups=groups),
        Transpose(),
    )


LAYERS = st.one_of(
    st.builds(lambda b: nn.Linear(FEATURES, FEATURES, bias=b), st.booleans()),
    st.builds(lambda b: TimeFirst(nn.Linear(FEATURES, FEATURES, bias=b)), st.booleans()),
    st.builds(lambda b: Folded(nn.Linear(FEATURES, FEATURES, bias=b)), st.booleans()),
    st.builds(
        conv,
        st.just(FEATURES),
        st.sampled_from([1, 3]),
        st.integers(1, 2),
        st.integers(1, 2),
        st.sampled_from(["zeros", "circular"]),
    ),
    st.builds(lambda: nn.Sequential(Transpose(), nn.ConvTranspose1d(FEATURES, FEATURES, 2, stride=2), Transpose())),
    st.builds(lambda: nn.LayerNorm(FEATURES)),
    st.builds(lambda: nn.Sequential(Transpose(), nn.GroupNorm(1, FEATURES), Transpose())),
    st.builds(lambda: nn.Sequential(Transpose(), nn.BatchNorm1d(FEATURES), Transpose())),
    st.builds(Affine, st.sampled_from(["mul-add", "rms", "odd"])),
    st.builds(SelfAttention, st.booleans()),
    st.builds(lambda: Twice(nn.Linear(FEATURES, FEATURES))),
    st.builds(lambda: nn.ReLU(inplace=True)),
    st.builds(nn.Tanh),
)


class Net(nn.Module):
    def __init__(self, layers, residual, tokens):
        super().__init__()
        self.embed = nn.Embedding(4, FEATURES) if tokens else None
        self.layers, self.head, self.residual = nn.ModuleList(layers), nn.Linear(FEATURES, 2), residual

    def forward(self, x):
        h = self.embed(x) if self.embed is not None else x
        for layer in self.layers:
            y = layer(h.clone())
            h = h + y if self.residual and y.shape == h.shape else y
        return self.head(torch.tanh(h)).mean(1) * 2


LAYOUTS = {
    "contiguous": lambda x: x,
    "time-major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack([x, x], 1)[:, 0],
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}
LOADERS = {
    "list": lambda batches: [(x,) for x in batches],
    "pairs": lambda batches: [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches],
    "generator": lambda batches: (x for x in batches),
    "loader": lambda batches: DataLoader(TensorDataset(torch.cat(batches)), batch_size=len(batches[0]), shuffle=True),
    "dicts": lambda batches: [{"x": x} for x in batches],
}


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 10_000))
    torch.manual_seed(seed)
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    net = Net(draw(st.lists(LAYERS, min_size=1, max_size=4)), draw(st.booleans()), draw(st.booleans())).to(dtype).eval()
    for p in net.parameters():
        p.data.copy_(0.7 * torch.randn(p.shape, dtype=torch.float64))
    n, t = draw(st.integers(1, 5)), draw(st.integers(3, 5))
    x = (
        torch.randint(0, 4, (n, t))
        if net.embed is not None
        else torch.randn(n, t, FEATURES, dtype=torch.float64).to(dtype)
    )
    x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)
    return (
        net,
        x,
        draw(st.integers(1, n)),
        draw(st.sampled_from([None, 1, 10_000])),
        draw(st.sampled_from(sorted(LOADERS))),
    )


def agree(problem):
    net, x, size, budget, kind = problem
    wide = copy.deepcopy(net).double()
    f = reference.fisher(wide, x.double() if x.is_floating_point() else x)
    single = next(net.parameters()).dtype == torch.float32
    scale, tol = float(f.abs().max()), 2e-3 if single else 1e-7
    close = lambda a, b: torch.testing.assert_close(
        a.double(), b, rtol=tol, atol=0.01 * tol * scale + (1e-7 if single else 1e-14)
    )
    fim = lambda r: nng.FIM(net, LOADERS[kind](list(x.split(size))), r, memory_budget=budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nng.MemoryWarning)
        close(fim(nng.PMatDense).to_dense(), f)
        close(fim(nng.PMatDiag).diag().flat(), f.diagonal())
        kfac, ekfac = fim(nng.PMatKFAC), fim(nng.PMatEKFAC)
        close(ekfac.trace(), f.trace())
        if not single:
            assert (ekfac.to_dense() - f).norm() <= (kfac.to_dense() - f).norm() * (1 + 1e-7) + 1e-12 * scale


@given(problems())
@settings(max_examples=800, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_random_models(problem):
    agree(problem)


@pytest.mark.slow
@given(problems())
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_random_models(problem):
    agree(problem)


@pytest.mark.parametrize("seed", [10, 20, 45, 93, 159, 545, 852, 990, 1320])
def test_small_gradients_do_not_hide_the_example_axis(seed):
    """An attention whose tokens are nearly equal and whose gradient is tiny: shapes leave its example axis open."""
    torch.manual_seed(seed)
    layers = [SelfAttention(bool(seed % 2))]
    if seed % 3:
        layers = [nn.Sequential(Transpose(), nn.GroupNorm(1, FEATURES), Transpose()), *layers]
    net = Net(layers, bool(seed % 5), True).eval()
    for p in net.parameters():
        p.data.copy_(0.7 * torch.randn(p.shape, dtype=torch.float64))
    x = torch.randint(0, 4, (2 + seed % 3, 3 + seed % 3))
    wide = copy.deepcopy(net).double()
    got, want = nng.Jacobian(net, [x]).tensor.double(), reference.jacobian(wide, x)
    at = 0
    for p in net.parameters():
        mine, true = got[..., at : at + p.numel()], want[..., at : at + p.numel()]
        assert (mine - true).norm() <= 1e-3 * true.norm() + 1e-5 * want.norm()
        at += p.numel()


def test_functional_conv_with_a_view_of_the_weight():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 2, dtype=torch.float64))

        def forward(self, x):
            return F.conv1d(x, self.weight.view(3, 4, 2)).sin().sum(2)

    model, x = Model(), torch.randn(4, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(nng.FIM(model, [x], nng.PMatDense).to_dense(), reference.fisher(model, x))
