"""Spectral margin, path norm, unit capacity, Fisher-Rao norm: against dense matrices, all paths, and invariances."""

import copy
import itertools
import math

import pytest
import reference
import torch
from cases import build
from small import Function, model_of, normal
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import nngeom as nng
from nngeom import analysis
from nngeom.analysis.chain import chain_of

f64 = torch.float64


class Functional(nn.Module):
    """A chain that calls functions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, (2, 3), (1, 2), (1, 0), bias=False), nn.Linear(24, 3, bias=False)

    def forward(self, x):
        return self.b(torch.flatten(F.relu(self.a(x)), 1).relu())


CHAINS = {
    "linear": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5, False), nn.ReLU(), nn.Linear(5, 3, False)), (4,)),
    "nested": (
        lambda: nn.Sequential(
            nn.Flatten(),
            nn.Sequential(nn.Linear(4, 5, False), nn.LeakyReLU(-1.5), nn.Dropout()),
            nn.Identity(),
            nn.Sequential(nn.Linear(5, 4, False), nn.ReLU(inplace=True), nn.Linear(4, 3, False)),
        ),
        (2, 2),
    ),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, padding="same", dilation=2, groups=2, bias=False),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(20, 3, False),
        ),
        (2, 5),
    ),
    "conv2d": (Functional, (2, 3, 5)),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2, 1, 1, bias=False), nn.Flatten(), nn.Linear(54, 3, False)),
        (1, 2, 2, 2),
    ),
    "weight-norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 5, False)), nn.ReLU(), nn.Linear(5, 3, False)),
        (4,),
    ),
}


@pytest.fixture(params=CHAINS)
def chain(request):
    make, shape = CHAINS[request.param]
    model = model_of(make())
    x = normal(7, *shape)
    y = model(x).argmax(1)
    return model, [(x[:3], y[:3]), (x[3:], y[3:])]


def close(x, y, tol=1e-9):
    torch.testing.assert_close(torch.as_tensor(x, dtype=f64), torch.as_tensor(y, dtype=f64), rtol=tol, atol=1e-12)


def dense(model, loader):
    """The matrices of all layers, in order, by what they do to unit vectors, and their biases."""
    found = []
    hooks = [
        m.register_forward_hook(lambda m, i, o: found.append((m, tuple(i[0].shape[1:]))))
        for m in model.modules()
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ]
    model(loader[0][0])
    for h in hooks:
        h.remove()
    units = [torch.eye(math.prod(shape), dtype=f64).view(-1, *shape) for _, shape in found]
    zeros = [m(torch.zeros(1, *shape, dtype=f64)).detach() for m, shape in found]
    return [((m(u) - z).detach().flatten(1).T, z.flatten()) for (m, _), u, z in zip(found, units, zeros)]


def moved(model):
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.add_(0.2 * torch.randn(p.shape, dtype=f64))
    return other


# -- spectral margin ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_reference", [False, True])
def test_spectral_margin_against_dense_matrices(chain, with_reference):
    model, loader = chain
    start = moved(model) if with_reference else None
    found = analysis.spectral_margin(model, loader, start, quantile=0.2, tol=1e-10)
    a = [m for m, _ in dense(model, loader)]
    m = [m for m, _ in dense(start, loader)] if start else [torch.zeros_like(x) for x in a]
    norms = torch.stack([torch.linalg.svdvals(x)[0] for x in a])
    distances = torch.stack([(x - z).norm(dim=1).sum() for x, z in zip(a, m)])
    lipschitz = 1.5 if any(isinstance(s, nn.LeakyReLU) and s.negative_slope < -1 for s in model.modules()) else 1
    complexity = lipschitz * norms.prod() * ((distances / norms) ** (2 / 3)).sum() ** 1.5
    x, y = (torch.cat(parts) for parts in zip(*loader))
    gamma = analysis.margins(model(x).detach(), y).quantile(0.2)
    for got, expected in (
        (found.spectral_norms, norms),
        (found.distances, distances),
        (found.complexity, complexity),
        (found.margin, gamma),
        (found.value, complexity / gamma),
        (found.bound_term, complexity * x.norm() / gamma / 7),
    ):
        close(got, expected, 1e-8)


def test_spectral_margin_ignores_what_is_multiplied_into_one_layer_and_out_of_another():
    make, shape = CHAINS["conv2d"]
    model, x = model_of(make()), normal(6, *shape)
    loader = [(x, model(x).argmax(1))]
    before = analysis.spectral_margin(model, loader)
    layers = model[0]
    layers.a.weight.data.mul_(8)
    layers.b.weight.data.div_(8)
    close(analysis.spectral_margin(model, loader).value, before.value)
    layers.b.weight.data.mul_(3)  # homogeneous in each layer, as the margin is
    close(analysis.spectral_margin(model, loader).value, before.value)


def test_a_layer_of_zeros_has_no_spectral_norm():
    model = model_of(nn.Conv1d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(3, 2))
    model[0].weight.data.zero_()
    loader = [(normal(4, 1, 3), torch.full((4,), int(model[2].bias.argmax())))]
    found = analysis.spectral_margin(model, loader, ignore_biases=True)
    assert found.spectral_norms[0] == 0 and found.complexity == 0
    start = copy.deepcopy(model)
    start[0].weight.data.fill_(2.0)
    close(analysis.spectral_margin(model, loader, start, ignore_biases=True).complexity, 6 * found.spectral_norms[1])


def test_single_precision_and_compiled_models_give_the_same():
    make, shape = CHAINS["conv2d"]
    model, x = model_of(make()), normal(6, *shape)
    y, start = model(x).argmax(1), moved(model)
    exact = analysis.spectral_margin(model, [(x, y)], start)
    single = analysis.spectral_margin(copy.deepcopy(model).float(), [(x.float(), y)], copy.deepcopy(start).float())
    assert single.value.dtype == torch.float32
    close(single.value, exact.value, 1e-3)
    close(single.spectral_norms, exact.spectral_norms, 1e-5)
    compiled = torch.compile(model)
    close(analysis.spectral_margin(compiled, [(x, y)], start).value, exact.value)
    close(analysis.path_norm(compiled, [x]), analysis.path_norm(model, [x]))
    close(analysis.fisher_rao_norm(compiled, [x]), analysis.fisher_rao_norm(model, [x]))


# -- path norm ---------------------------------------------------------------------------------------------------------


def by_paths(layers, p):
    """The sum over all paths, one by one, those that begin at a bias included."""
    total = 0.0
    begins = [([m for m, _ in layers], torch.ones(layers[0][0].shape[1]))]
    begins += [([m for m, _ in layers[i + 1 :]], bias) for i, (_, bias) in enumerate(layers)]
    for matrices, first in begins:
        for path in itertools.product(range(len(first)), *(range(len(m)) for m in matrices)):
            weights = [float(m[j, i]) for m, i, j in zip(matrices, path, path[1:])]
            total += abs(math.prod(weights, start=float(first[path[0]]))) ** p
    return total ** (1 / p)


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_path_norm_against_all_paths(p):
    torch.manual_seed(0)
    mlp = model_of(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.LeakyReLU(), nn.Linear(3, 2))
    conv = model_of(nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), nn.Conv2d(2, 1, 2, 2), nn.Flatten(), nn.Linear(4, 2))
    for model, shape in ((mlp, (3,)), (conv, (1, 3, 3))):
        loader = [(normal(2, *shape),)]
        close(analysis.path_norm(model, loader, p), by_paths(dense(model, loader), p))
    inplace = build("inplace")
    close(analysis.path_norm(inplace.model, inplace.loader, p), by_paths(dense(inplace.model, inplace.loader), p))


def test_path_norm_of_chains(chain):
    model, loader = chain
    product = torch.ones(1, dtype=f64)
    for m, _ in dense(model, loader):
        product = m.square() @ (product if len(product) > 1 else torch.ones(m.shape[1], dtype=f64))
    close(analysis.path_norm(model, loader), product.sum().sqrt())


def rescaled(model, unit, by):
    """The same function: the weights into a hidden unit multiplied, those out of it divided."""
    other = copy.deepcopy(model)
    other[0].weight.data[unit] *= by
    if other[0].bias is not None:
        other[0].bias.data[unit] *= by
    other[2].weight.data[:, unit] /= by
    return other


def test_path_norm_is_that_of_the_function_rescaled():
    model, loader = model_of(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), [normal(2, 3)]
    close(analysis.path_norm(rescaled(model, 1, 9.0), loader), analysis.path_norm(model, loader))
    assert analysis.path_norm(model.float(), [normal(2, 3).float()]).dtype == f64


# -- unit capacity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
def test_unit_capacity_against_loops(flat):
    torch.manual_seed(1)
    model = model_of(nn.Flatten(), nn.Linear(4, 6, False), nn.ReLU(), nn.Linear(6, 3, False))
    x = normal(9, 4) if flat else normal(9, 2, 2)
    y, start = model(x).argmax(1), moved(model)
    found = analysis.unit_capacity(model, [(x[:5], y[:5]), (x[5:], y[5:])], start, quantile=0.5)
    u, v, u0 = (p.detach() for p in (*model.parameters(), next(start.parameters())))
    x = x.flatten(1)
    capacity = [float((u[j] - u0[j]).norm()) for j in range(6)]
    impact = [float(v[:, j].norm()) for j in range(6)]
    close(found.capacity, capacity)
    close(found.impact, impact)
    close(found.complexity, sum(impact[j] * (capacity[j] * x.norm() + (x @ u0[j]).norm()) for j in range(6)))
    spectral = torch.linalg.svdvals(u0)[0]
    close(found.value, (spectral * v.norm() + (u - u0).norm() * v.norm() + math.sqrt(6)))
    close(found.frobenius, (v.norm() * ((u - u0).norm() * x.norm() + (x @ u0.T).norm())))
    assert found.complexity <= found.frobenius
    gamma = analysis.margins(model(x.view(9, 4)).detach(), y).quantile(0.5)
    close(found.bound_term, found.complexity / gamma / 9)


def test_unit_capacity_does_not_grow_with_units_that_stay_and_do_not_count():
    model = model_of(nn.Linear(4, 6, False), nn.ReLU(), nn.Linear(6, 3, False))
    x = normal(5, 4)
    start, loader = moved(model), [(x, model(x).argmax(1))]
    before = analysis.unit_capacity(model, loader, start)
    for net in (model, start):
        net[0] = nn.Linear(4, 8, False).double()
        net[2] = nn.Linear(8, 3, False).double()
    model[2].weight.data[:, 6:] = 0
    found = analysis.unit_capacity(model, [(x, model(x).argmax(1))], start)
    assert found.impact[6:].tolist() == [0, 0] and len(before.capacity) == 6
    parts = found.impact * (found.capacity * x.norm() + (x @ start[0].weight.detach().T).norm(dim=0))
    close(found.complexity, parts[:6].sum())


# -- Fisher-Rao norm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv2d", "attention", "gru", "frozen"])
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_fisher_rao_against_the_dense_matrix(name, likelihood):
    case = build(name)
    w = nng.PVector.from_model(case.model).flat().detach()
    fisher = nng.FIM(case.model, case.loader, nng.PMatDense, likelihood=likelihood).to_dense()
    if likelihood == "categorical":
        close(fisher, reference.fisher(case.model, case.inputs), 1e-7)
    close(analysis.fisher_rao_norm(case.model, case.loader, likelihood), (w @ fisher @ w).sqrt())


def test_fisher_rao_closed_form_of_homogeneous_networks(chain):
    model, loader = chain
    depth = len(dense(model, loader))
    f = torch.cat([model(x) for x, _ in loader]).detach()
    p = f.softmax(1)
    variance = (p * f.square()).sum(1) - (p * f).sum(1).square()
    close(analysis.fisher_rao_norm(model, loader).square(), depth**2 * variance.mean())
    close(analysis.fisher_rao_norm(model, loader, "gaussian").square(), depth**2 * f.square().sum(1).mean())


def test_fisher_rao_is_that_of_the_function_rescaled_and_not_closed_with_biases():
    model, x = model_of(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), normal(5, 3)
    found = analysis.fisher_rao_norm(model, [x], "gaussian")
    assert abs(found.square() - 4 * model(x).square().sum(1).mean()) > 1e-3
    only = nng.LayerCollection.from_model(model, include=["0"])
    w = nng.PVector.from_model(model, only).flat()
    fisher = nng.FIM(model, [x], nng.PMatDense, likelihood="gaussian", layer_collection=only).to_dense()
    close(analysis.fisher_rao_norm(model, [x], "gaussian", layer_collection=only), (w @ fisher @ w).sqrt().detach())
    bare = model_of(nn.Linear(3, 4, False), nn.ReLU(), nn.Linear(4, 2, False))
    close(analysis.fisher_rao_norm(rescaled(bare, 2, 5.0), [x]), analysis.fisher_rao_norm(bare, [x]))


# -- what is refused ---------------------------------------------------------------------------------------------------

NO_CHAINS = {
    "mlp": "Tanh, is not understood",
    "residual": "BatchNorm2d, is not understood",
    "batch-norm": "BatchNorm1d, is not understood",
    "prelu": "PReLU, is not understood",
    "conv2d-circular": "circular|could not be read",  # torch 2.6 does not trace what follows the convolution
    "reused": "expected",
    "language-model": "expected",
    "attention": "expected",
    "gru": "expected",
}


@pytest.mark.parametrize("name", NO_CHAINS)
def test_what_is_no_chain_is_refused(name):
    case = build(name)
    for measure in (analysis.path_norm, analysis.spectral_margin):
        with pytest.raises(nng.StructureError, match=NO_CHAINS[name]):
            measure(case.model, case.loader)


def test_other_forward_passes_are_refused():
    x = normal(3, 4)
    linear = nn.Linear(4, 3, False).double()
    hooked = copy.deepcopy(linear)
    hooked.register_forward_hook(lambda m, i, o: 2 * o)
    with pytest.raises(nng.StructureError, match="hooks"):
        analysis.path_norm(hooked, [x])
    with pytest.raises(nng.StructureError, match="mul"):
        analysis.path_norm(Function(lambda m, x: 2 * m.a(x), a=linear), [x])
    with pytest.raises(nng.StructureError, match="add takes other inputs"):
        analysis.path_norm(Function(lambda m, x: x + m.a(x), a=nn.Linear(4, 4).double()), [x])
    with pytest.raises(nng.StructureError, match="could not be read"):
        analysis.path_norm(Function(lambda m, x: m.a(x) if x.sum() > 0 else x, a=linear), [x])
    patched = copy.deepcopy(linear)
    patched.forward = lambda x: F.linear(x, patched.weight) + 1
    with pytest.raises(nng.StructureError, match="something else too"):
        analysis.path_norm(patched, [x])
    with pytest.raises(nng.StructureError, match="position by position"):
        analysis.path_norm(nn.Sequential(linear, nn.Flatten()), [normal(3, 2, 4)])
    with pytest.raises(nng.StructureError, match="Dropout, is not understood"):
        analysis.path_norm(nn.Sequential(linear, nn.Dropout()), [x])
    with pytest.raises(nng.StructureError, match="no linear map"):
        chain_of(nn.ReLU())
    with pytest.raises(nng.StructureError, match="circular"):
        chain_of(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Flatten()))
    with pytest.raises(nng.StructureError, match="flatten is not understood"):
        chain_of(Function(lambda m, x: m.a(x.flatten(0)), a=linear))


def test_arguments_that_are_refused():
    torch.manual_seed(0)
    model = model_of(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    bare = model_of(nn.Linear(4, 5, False), nn.ReLU(), nn.Linear(5, 3, False))
    x = normal(6, 4)
    right, wrong = [(x, bare(x).argmax(1))], [(x, bare(x).argmin(1))]
    for measure in (analysis.spectral_margin, analysis.unit_capacity):
        with pytest.raises(nng.ArgumentError, match="0, 2 have some"):
            measure(model, right, copy.deepcopy(model))
        with pytest.raises(nng.ArgumentError, match="expected a positive margin"):
            measure(bare, wrong, copy.deepcopy(bare))
        with pytest.raises(nng.ArgumentError, match="quantile is 2"):
            measure(bare, right, bare, quantile=2)
        with pytest.raises(nng.StructureError, match="two copies of one model"):
            measure(bare, right, nn.Linear(4, 3))
        with pytest.raises(nng.LoaderError, match="targets"):
            measure(bare, [(x,)], bare)
        y = model(x).argmax(1)
        assert measure(model, [(x, y)], bare, ignore_biases=True).margin > 0
    deep = model_of(nn.Linear(4, 3, False), nn.LeakyReLU(), nn.Linear(3, 3, False))
    with pytest.raises(nng.StructureError, match="Linear, ReLU, Linear; the model is Linear, Activation"):
        analysis.unit_capacity(deep, right, deep)
    with pytest.raises(nng.ArgumentError, match="reference is NoneType"):
        analysis.unit_capacity(bare, right, None)
    for p in (0.5, math.inf, math.nan):
        with pytest.raises(nng.ArgumentError, match="p is"):
            analysis.path_norm(bare, right, p)
    with pytest.raises(nng.LoaderError, match="one shape"):
        net = model_of(nn.Conv1d(1, 2, 3, padding=1, bias=False), nn.Conv1d(2, 1, 5, bias=False), nn.Flatten())
        analysis.spectral_margin(net, [(normal(2, 1, 5), torch.zeros(2)), (normal(2, 1, 6), torch.zeros(2))])
    with pytest.raises(nng.NonFiniteError):
        analysis.path_norm(bare, [x / 0])
