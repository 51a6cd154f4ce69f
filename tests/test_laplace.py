"""Curvature for laplace-torch: sums over a batch against plain autograd, evidence against laplace's own backends."""

import copy
import runpy
import sys

import pytest
import torch
from cases import CASES, build
from reference import fisher, jacobian, loss_gradients, parameters, sandwich
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import nngeom as nng
from nngeom.pmat.kronecker import KroneckerBlock

laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
BackPackGGN, CurvlinopsGGN = laplace.curvature.BackPackGGN, laplace.curvature.CurvlinopsGGN
CurvlinopsEF = laplace.curvature.CurvlinopsEF
NNGeomGGN, NNGeomEF = nng.interop.laplace.NNGeomGGN, nng.interop.laplace.NNGeomEF

MODELS = ["mlp", "sequence", "conv2d", "depthwise", "residual", "embedding", "layer-norm", "batch-norm", "reused"]
MODELS += ["tied", "language-model", "attention", "transformer", "class-token", "experts", "gru", "bare", "frozen"]
UNHELD = {"conv3d", "deconv3d", "temperature"}  # laplace's Kron.init_from_model knows one to four axes
KRON = [name for name in CASES if name not in UNHELD]
CASES_OF_BOTH = [(x, y) for x in ("classification", "regression") for y in ("full", "kron", "diag")]
MIDDLE = pytest.mark.filterwarnings("ignore")  # of hooks and casts in laplace, BackPACK and curvlinops


# weights that laplace cannot hold as a pair: groups, transposed kernels, tables of norms, products of another shape
BODY = {"body.0.weight", "body.0.bias"}
EXACT = {"conv1d": BODY, "conv2d": BODY, "deconv1d": BODY, "deconv2d": BODY, "depthwise": {"body.0.weight"}}
EXACT |= {"layer-norm": {"body.1.weight", "body.1.bias"}, "einsum": {"mix", "up"}, "experts": {"experts"}}


def vectors(table: nng.LayerCollection) -> set[str]:
    """The parameters of layers of vectors alone."""
    shapes = table.offsets()
    return {n for names in table.by_layer().values() if all(len(shapes[m][1]) < 2 for m in names) for n in names}


@pytest.fixture
def doubles():
    """Float64 by default: CurvlinopsGGN multiplies by an identity matrix of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(name: str, likelihood: str) -> tuple:
    """A model of the zoo, its inputs, and targets."""
    torch.manual_seed(0)
    case = build(name)
    y = case.targets if likelihood == "classification" else torch.randn(case.n, 3, dtype=torch.float64)
    return case.model, case.inputs, y


def truth(model: nn.Module, x: torch.Tensor, likelihood: str) -> torch.Tensor:
    """The Gauss-Newton matrix summed over the examples."""
    if likelihood == "classification":
        return len(x) * fisher(model, x)
    j = jacobian(model, x)
    return len(x) * sandwich(j, torch.eye(len(j), dtype=j.dtype).expand(len(x), -1, -1))


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("name", MODELS)
def test_full_and_diagonal_are_sums_over_the_batch(name, likelihood):
    model, x, y = batch(name, likelihood)
    backend, expected = NNGeomGGN(model, likelihood), truth(model, x, likelihood)
    value = F.cross_entropy(model(x), y, reduction="sum") if likelihood == "classification" else None
    value = 0.5 * (model(x) - y).square().sum() if value is None else value
    for loss, h, want in [(*backend.full(x, y, N=7), expected), (*backend.diag(x, y, N=7), expected.diag())]:
        torch.testing.assert_close(loss, value.detach())
        torch.testing.assert_close(h, want)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("name", MODELS)
def test_empirical_fisher_has_the_scale_of_laplace(name, likelihood):
    """Laplace takes gradients of the squared error without the half, and halves their second moment."""
    model, x, y = batch(name, likelihood)
    backend = NNGeomEF(model, likelihood)
    loss = F.cross_entropy if likelihood == "classification" else lambda f, y: (f - y).square()
    g = loss_gradients(model, x, y, loss)
    expected = (1.0 if likelihood == "classification" else 0.5) * g.T @ g
    torch.testing.assert_close(backend.full(x, y)[1], expected)
    torch.testing.assert_close(backend.diag(x, y)[1], expected.diag())
    rows, value = backend.gradients(x, y)
    torch.testing.assert_close(rows, g)
    torch.testing.assert_close(value, sum(loss(model(a[None]), b[None]).sum() for a, b in zip(x, y)).detach())


@pytest.mark.parametrize("name", KRON)
def test_factors_of_every_layer(name):
    """Of a weight those of PMatKFAC, of a bias its own block, of vectors without a weight the exact block."""
    model, x, y = batch(name, "classification")
    backend = NNGeomGGN(model, "classification")
    _, kron = backend.kron(x, y, N=len(x))
    factored, exact = len(x) * nng.FIM(model, (x, y), nng.PMatKFAC).to_dense(), truth(model, x, "classification")
    table, got = nng.LayerCollection.from_model(model), kron.to_matrix()
    expected = torch.zeros_like(exact)
    for names in table.by_layer().values():
        assert not all(len(table.offsets()[n][1]) < 2 for n in names) or set(names) <= set(backend.exact)
        for name_, (lo, shape) in ((n, table.offsets()[n]) for n in names):
            part = slice(lo, lo + torch.Size(shape).numel())
            expected[part, part] = (exact if name_ in backend.exact else factored)[part, part]
    assert set(backend.exact) - vectors(table) == EXACT.get(name, set())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(kron.diag(), expected.diag())


@pytest.mark.parametrize("name", ["mlp", "embedding", "gru", "transformer", "conv2d"])
def test_factors_add_up_over_batches(name):
    """The sum over batches is the Kronecker product of means over the data set, in any number of batches."""
    model, x, y = batch(name, "classification")
    backend = NNGeomGGN(model, "classification")
    whole = backend.kron(x, y, N=len(x))[1]
    start = laplace.utils.Kron.init_from_model(parameters(model), x.device, torch.float64)
    parts = [start, *(backend.kron(x[s], y[s], N=len(x))[1] for s in (slice(0, 3), slice(3, None)))]
    total = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(total.to_matrix(), whole.to_matrix())
    torch.testing.assert_close((3.0 * total).to_matrix(), 3 * whole.to_matrix())


@pytest.mark.parametrize("name", ["mlp", "gru", "transformer", "language-model"])
def test_blocks_of_biases_are_read_off_their_factors(name, monkeypatch):
    """Not by products with a unit vector of the whole layer for every bias."""
    model, x, y = batch(name, "classification")
    backend, whole = NNGeomGGN(model, "classification"), nng.FIM(model, (x, y), nng.PMatKFAC).to_dense()

    def refuse(block, x):
        raise AssertionError(f"a product with {tuple(x.shape)}")

    monkeypatch.setattr(KroneckerBlock, "mv", refuse)
    table, (_, kron) = nng.LayerCollection.from_model(model), backend.kron(x, y, N=len(x))
    single = [j for j, f in enumerate(kron.kfacs) if len(f) == 1 and table.names[j] not in backend.exact]
    assert single
    for j in single:
        lo, shape = table.offsets()[table.names[j]]
        part = slice(lo, lo + torch.Size(shape).numel())
        torch.testing.assert_close(kron.kfacs[j][0], len(x) * whole[part, part])


@MIDDLE
@pytest.mark.parametrize("weights", ["all", "last_layer"])
@pytest.mark.parametrize("likelihood, structure", CASES_OF_BOTH)
def test_evidence_is_that_of_the_backends_of_laplace(likelihood, structure, weights, doubles):
    torch.manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (50,)) if likelihood == "classification" else torch.randn(50, 3, dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, y), batch_size=20)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def fitted(backend):
        settings = {"subset_of_weights": weights, "hessian_structure": structure, "prior_precision": 2.0}
        la = laplace.Laplace(copy.deepcopy(model), likelihood, backend=backend, **settings)
        la.fit(loader)
        return la

    ours = fitted(NNGeomGGN)
    for theirs in map(fitted, (CurvlinopsGGN, BackPackGGN)):
        torch.testing.assert_close(
            ours.log_marginal_likelihood(), theirs.log_marginal_likelihood(), rtol=1e-12, atol=0.0
        )
        torch.testing.assert_close(ours(x[:5]), theirs(x[:5]))
    if not (weights == "last_layer" and structure == "diag"):  # there CurvlinopsEF takes all gradients of the model
        empirical = [fitted(backend).log_marginal_likelihood() for backend in (NNGeomEF, CurvlinopsEF)]
        torch.testing.assert_close(*empirical, rtol=1e-12, atol=0.0)


@MIDDLE
def test_factors_of_convolutions_are_those_of_laplace():
    torch.manual_seed(0)
    x, y = torch.randn(20, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (20,))
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(108, 3)).double()
    ours = NNGeomGGN(model, "classification").kron(x, y, N=20)[1].to_matrix()
    theirs = CurvlinopsGGN(copy.deepcopy(model), "classification").kron(x, y, N=20)[1].to_matrix()
    torch.testing.assert_close(ours, theirs)
    reduced = NNGeomGGN(model, "classification", sharing="reduce").kron(x, y, N=20)[1].to_matrix()
    options = {"kfac_approx": "reduce"}
    torch.testing.assert_close(reduced, NNGeomGGN(model, "classification").kron(x, y, N=20, **options)[1].to_matrix())
    theirs = CurvlinopsGGN(copy.deepcopy(model), "classification").kron(x, y, N=20, **options)[1].to_matrix()
    torch.testing.assert_close(reduced, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_jacobians(name):
    model, x, _ = batch(name, "classification")
    j = jacobian(model, x).transpose(0, 1)
    backend = NNGeomGGN(model, "classification")
    rows, f = backend.jacobians(x)
    torch.testing.assert_close(rows, j)
    torch.testing.assert_close(f, model(x).detach())
    chosen = torch.randint(0, 3, (len(x), 2))
    picked = j.gather(1, chosen.unsqueeze(-1).expand(-1, -1, j.shape[-1]))
    torch.testing.assert_close(backend.selected_output_jacobians(x, chosen)[0], picked)
    torch.testing.assert_close(backend.selected_output_jacobians(x, chosen[:, 0])[0], picked[:, :1])


def test_jacobians_with_a_graph():
    model, x, _ = batch("mlp", "classification")
    x.requires_grad_()
    rows, f = NNGeomGGN(model, "classification").jacobians(x, enable_backprop=True)
    torch.testing.assert_close(rows, jacobian(model, x).transpose(0, 1))
    assert torch.autograd.grad(rows.sum() + f.sum(), x)[0].abs().sum() > 0
    picked, _ = NNGeomGGN(model, "classification").selected_output_jacobians(x, torch.zeros(len(x)).long(), True)
    torch.testing.assert_close(picked, rows[:, :1])


@MIDDLE
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_subnetworks(structure):
    model, x, y = batch("transformer", "classification")
    chosen = torch.tensor([3, 40, 41, 90])
    settings = {"subset_of_weights": "subnetwork", "subnetwork_indices": chosen, "hessian_structure": structure}
    la = laplace.Laplace(model, "classification", backend=NNGeomGGN, **settings)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=3))
    expected = truth(model, x, "classification")[chosen][:, chosen]
    torch.testing.assert_close(la.H, expected if structure == "full" else expected.diag())
    assert la.backend.jacobians(x)[0].shape == (len(x), 3, 4)


@MIDDLE
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_functional_laplace(likelihood):
    torch.manual_seed(0)
    x = torch.randn(30, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (30,)) if likelihood == "classification" else torch.randn(30, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    found = []
    for backend in (NNGeomGGN, CurvlinopsGGN):
        settings = {"hessian_structure": "gp", "n_subset": 20, "prior_precision": 2.0}
        la = laplace.Laplace(copy.deepcopy(model), likelihood, "all", backend=backend, **settings)
        la.fit(DataLoader(TensorDataset(x, y), batch_size=10))
        found.append((la.log_marginal_likelihood(), la(x[:4])))
    torch.testing.assert_close(*found)


@MIDDLE
@pytest.mark.parametrize("name", ["residual", "attention", "transformer", "embedding", "depthwise", "gru"])
def test_approximations_of_models_that_others_refuse(name):
    """Residual nets with batch norm, attention, embeddings, groups, recurrent cells: evidence against dense truth."""
    model, x, y = batch(name, "classification")
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    h, w = truth(model, x, "classification"), torch.nn.utils.parameters_to_vector(parameters(model)).detach()
    for structure in ("full", "kron", "diag"):
        settings = {"subset_of_weights": "all", "hessian_structure": structure, "prior_precision": 2.0}
        la = laplace.Laplace(model, "classification", backend=NNGeomGGN, **settings)
        la.fit(loader)
        if structure == "kron":
            held = NNGeomGGN(model, "classification").kron(x, y, N=len(x))[1].to_matrix()
        else:
            held = h if structure == "full" else h.diag().diag()
        posterior = held + 2 * torch.eye(len(h), dtype=h.dtype)
        occam = posterior.logdet() - len(h) * torch.tensor(2.0).log()
        expected = -F.cross_entropy(model(x), y, reduction="sum") - 0.5 * (occam + 2 * w @ w)
        torch.testing.assert_close(la.log_marginal_likelihood().double(), expected.detach(), rtol=1e-7, atol=1e-7)
        assert la(x[:2]).shape == (2, 3)


class Adapted(nn.Module):
    """A frozen linear map with a trainable one of low rank beside."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(4, 3), nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@MIDDLE
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_adapters_alone(structure):
    torch.manual_seed(0)
    model, x, y = Adapted().double(), torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))
    la = laplace.Laplace(model, "classification", "all", hessian_structure=structure, backend=NNGeomGGN)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=5))
    assert la.mean.numel() == 14
    h = truth(model, x, "classification")
    held = {"full": h, "diag": h.diag(), "kron": nng.FIM(model, (x, y), nng.PMatKFAC).to_dense() * 12}[structure]
    torch.testing.assert_close(la.H.to_matrix() if structure == "kron" else la.H, held)


@MIDDLE
def test_dictionaries_as_language_models_take_them():
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, batch):
            return self.head(self.table(batch["input_ids"]).mean(1).tanh())

    model, ids, y = Reader().double(), torch.randint(0, 7, (6, 5)), torch.randint(0, 3, (6,))
    expected = truth(_ofids(model), ids, "classification")
    for backend in (NNGeomGGN(model, "classification"), NNGeomGGN(model, "classification", check=False)):
        x = {"input_ids": ids, "labels": y}
        torch.testing.assert_close(backend.full(x, y)[1], expected)
        torch.testing.assert_close(backend.jacobians(x)[0], jacobian(_ofids(model), ids).transpose(0, 1))


def _ofids(model: nn.Module) -> nn.Module:
    class OfIds(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            return self.inner({"input_ids": ids})

    return OfIds()


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_drawn_targets(likelihood):
    """Monte Carlo comes near the exact matrix, draws anew in every batch, and repeats with the seed."""
    model, x, y = batch("mlp", likelihood)
    backend = NNGeomGGN(model, likelihood, stochastic=True, num_samples=1000)
    first = backend.full(x, y)[1]
    expected = truth(model, x, likelihood)
    assert (first - expected).norm() < 0.2 * expected.norm()
    one = NNGeomGGN(model, likelihood, stochastic=True)
    draws = [one.kron(x, y, N=7)[1].to_matrix() for _ in range(2)]
    assert (draws[0] - draws[1]).norm() > 1e-3 * draws[0].norm()
    assert one.kron(x, y, N=7, mc_samples=50)[1].to_matrix().isfinite().all()
    torch.manual_seed(3)
    for method, shape in ((one.full, expected.shape), (one.diag, (len(expected),))):
        many = method(x, y, N=7, mc_samples=1000)[1]
        exact = expected if many.ndim == 2 else expected.diag()
        assert many.shape == shape and (many - exact).norm() < 0.2 * exact.norm() < (method(x, y)[1] - exact).norm()
    torch.manual_seed(3)
    again = one.diag(x, y)[1]
    torch.manual_seed(3)
    torch.testing.assert_close(one.diag(x, y)[1], again, rtol=0, atol=0)


def test_positions_of_an_example_are_summed():
    """Labels ``(n, t)`` under logits ``(n, t, c)``: what laplace's losses make of tokens."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(5, 6, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (5, 6))
    backend, expected = NNGeomGGN(model, "classification"), truth(model, x.flatten(0, 1), "classification")
    torch.testing.assert_close(backend.full(x, y)[1], expected)
    torch.testing.assert_close(backend.diag(x, y)[1], expected.diag())
    value = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").detach()
    torch.testing.assert_close(backend.diag(x, y)[0], value)
    rows = jacobian(model, x.flatten(0, 1)).transpose(0, 1).view(5, 6, 3, -1)
    torch.testing.assert_close(backend.jacobians(x)[0], rows)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "laplace.curvature", None)
    monkeypatch.delitem(sys.modules, "nngeom.interop.laplace_torch")
    with pytest.raises(nng.MissingExtraError, match="pip install --no-deps laplace-torch"):
        runpy.run_path(nng.interop.laplace.__file__)


def test_refusals():
    model, x, y = batch("conv2d", "classification")
    with pytest.raises(nng.StructureError, match=r"block_limit=5.*hessian_structure='diag'"):
        NNGeomGGN(model, "classification", block_limit=5).kron(x, y, N=7)
    model, x, y = batch("gru", "classification")
    backend = NNGeomGGN(model, "classification")
    with pytest.raises(nng.ArgumentError, match="no options"):
        backend.kron(x, y, N=7, kfac_aprox="reduce")
    for method in (backend.full, backend.diag):
        with pytest.raises(nng.ArgumentError, match=f"{method.__name__} has no options.*expected mc_samples"):
            method(x, y, N=7, samples=5)
    with pytest.raises(nng.ArgumentError, match="chosen for 2 examples"):
        backend.selected_output_jacobians(x, torch.zeros(2).long())
    backend.subnetwork_indices = torch.tensor([1])
    with pytest.raises(nng.ArgumentError, match="subnetwork"):
        backend.kron(x, y, N=7)
    with pytest.raises(nng.ArgumentError, match="num_samples"):
        backend.full(x, y, mc_samples=2)
    backend.subnetwork_indices = None
    factors = backend.kron(x, y, N=7)[1]
    with pytest.raises(nng.ArgumentError, match="cannot be added"):
        factors + 1
    model, x, y = batch("mlp", "classification")
    other = NNGeomGGN(model, "classification").kron(x, y, N=7)
    with pytest.raises(nng.ArgumentError, match="cannot be added"):
        factors + other[1]
    swapped = type(factors)(factors.kfacs[::-1])
    with pytest.raises(nng.ArgumentError, match="same structure"):
        factors + swapped
