"""Spectra, alignment, eigenfunctions, complexity, SuperNat: identities, loops on the zoo, degenerate inputs."""

import math

import pytest
import reference
import torch
from cases import build
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom import analysis
from nngeom.analysis.rows import layer_kernel
from nngeom.cotangents.loss import EveryOutput
from nngeom.fmat.side import Side
from nngeom.sweep.run import Run

ZOO = ["mlp", "conv2d", "attention", "language-model"]


def close(x, y, tol=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(x, dtype=torch.float64),
        torch.as_tensor(y, dtype=torch.float64),
        rtol=tol,
        atol=tol,
        equal_nan=True,
    )


@pytest.fixture(params=ZOO, scope="module")
def case(request):
    c = build(request.param)
    c.__dict__["jacobian"] = reference.jacobian(c.model, c.inputs)
    c.__dict__["name"] = request.param
    return c


def psd(n, rank=None, c=1, seed=0):
    """``(c, n, c, n)``, random, and its features ``(c, n, rank)``."""
    phi = torch.randn(c, n, rank or n + 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.einsum("knd,lmd->knlm", phi, phi), phi


# -- spectrum ----------------------------------------------------------------------------------------------------------


def test_effective_rank_values():
    one = lambda *values: analysis.effective_rank(torch.tensor(values, dtype=torch.float64))
    close(one(1, 1, 1, 1), 4)
    close(one(5, 0, 0), 1)
    close(one(3, 1), 1.754765, 1e-6)
    close(one(0, 0), 0)
    close(analysis.effective_rank(torch.eye(4, dtype=torch.float64)), 4)
    with pytest.raises(nng.ArgumentError, match="at least one"):
        one()
    with pytest.raises(nng.NonFiniteError):
        one(1.0, math.nan)
    with pytest.raises(nng.ArgumentError, match="FMat"):
        analysis.effective_rank("K")


def test_effective_rank_of_every_kind_of_matrix(case):
    kernel = nng.GramMatrix(case.model, case.loader)
    fisher = nng.FIM(case.model, case.loader, nng.PMatDense)
    dense = kernel.to_dense()
    mu = torch.linalg.eigvalsh(dense).clamp_min(0)
    mu = mu / mu.sum()
    expected = (-(mu[mu > 1e-12] * mu[mu > 1e-12].log()).sum()).exp()
    close(analysis.effective_rank(kernel), expected, 1e-7)
    close(analysis.effective_rank(kernel.tensor), expected, 1e-7)
    close(analysis.effective_rank(kernel.eigh()[0]), expected, 1e-7)
    close(analysis.effective_rank(7 * kernel), expected, 1e-7)
    assert analysis.effective_rank(fisher) <= 7 * 2 + 1e-9  # rank n (c - 1)


def test_renyi_ordering_and_trace_ratios(case):
    k = nng.GramMatrix(case.model, case.loader)
    s = analysis.spectrum_summary(k)
    assert (
        s.trace / s.largest <= s.participation + 1e-9
        and s.participation <= s.effective_rank + 1e-9
        and s.effective_rank <= s.rank + 1e-9
    )
    ratios = analysis.trace_ratios(k, range(s.rank + 2))
    assert bool((ratios.diff() >= 0).all())
    close(ratios[0], 0)
    close(ratios[1], s.largest / s.trace)
    close(ratios[s.rank :], torch.ones(2))
    close(analysis.trace_ratios(3 * k, 2), ratios[2])
    with pytest.raises(nng.ArgumentError, match="at least 0"):
        analysis.trace_ratios(k, [-1])


# -- alignment ---------------------------------------------------------------------------------------------------------


def test_alignment_properties():
    k, phi = psd(6, c=2)
    other, _ = psd(6, c=2, seed=1)
    for how in (True, "global", False):
        close(analysis.alignment(k, k, how), 1)
        value = analysis.alignment(k, other, how)
        assert 0 <= value <= 1
        close(analysis.alignment(3 * k, 0.1 * other, how), value)
        close(analysis.alignment(other, k, how), value)
        order = torch.randperm(6)
        close(analysis.alignment(k[:, order][:, :, :, order], other[:, order][:, :, :, order], how), value)
        rotation = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0]
        turned = phi @ rotation
        close(analysis.alignment(torch.einsum("knd,lmd->knlm", turned, turned), other, how), value)
    close(analysis.alignment(k + 5, other, "global"), analysis.alignment(k, other, "global"))
    shifted = phi + torch.randn(2, 1, 9, dtype=torch.float64)  # one shift an output
    close(analysis.alignment(torch.einsum("knd,lmd->knlm", shifted, shifted), other), analysis.alignment(k, other))
    close(
        analysis.hsic(k, other),
        analysis.alignment(k, other) * analysis.center(k).norm() * analysis.center(other).norm(),
    )
    assert analysis.alignment(torch.zeros(3, 3), torch.eye(3)).isnan()
    with pytest.raises(nng.ArgumentError, match="shapes"):
        analysis.alignment(torch.eye(3), torch.eye(4))
    with pytest.raises(nng.ArgumentError, match="centered"):
        analysis.alignment(k, k, "other")


def test_label_kernel():
    y = torch.tensor([0, 2, 2, 1])
    k = analysis.label_kernel(y, 3, torch.float64)
    assert isinstance(k, nng.FMatDense) and k.tensor.shape == (3, 4, 3, 4)
    v = F.one_hot(y, 3).T.flatten().double()
    close(k.to_dense(), torch.outer(v, v))
    close(analysis.label_kernel(torch.tensor([0, 1, 1]), 1).to_dense(), [[1, -1, -1], [-1, 1, 1], [-1, 1, 1]])
    close(analysis.label_vector(torch.tensor([[1.5, 2.0]]), 2), [[1.5], [2.0]])
    tokens = analysis.label_vector(torch.tensor([[0, 1]]), 6)  # three classes, two positions
    close(tokens.view(3, 2), [[1, 0], [0, 1], [0, 0]])
    for wrong in (torch.tensor([0, 3]), torch.tensor([[1.0, 2.0]])):
        with pytest.raises(nng.OutputError):
            analysis.label_vector(wrong, 3)


def test_the_fast_formula_of_label_alignment(case):
    k = nng.GramMatrix(case.model, case.loader)
    labels = analysis.label_kernel(case.targets, 3, torch.float64)
    for how in (True, "global", False):
        close(analysis.kernel_label_alignment(k, case.targets, centered=how), analysis.alignment(k, labels, how))
    for centered in (True, False):
        close(analysis.label_alignment(case.model, case.loader, centered), analysis.alignment(k, labels, centered))
    kernels = nng.GramMatrices(case.model, case.loader)
    by_layer = analysis.label_alignment(case.model, case.loader, by_layer=True)
    assert list(by_layer) == list(kernels)
    for layer, value in by_layer.items():
        close(value, analysis.alignment(kernels[layer], labels))


@pytest.mark.filterwarnings("ignore::nngeom.core.errors.MemoryWarning")
def test_label_alignment_is_cut_to_a_budget(case):
    close(
        analysis.label_alignment(case.model, case.loader, memory_budget=3000),
        analysis.label_alignment(case.model, case.loader),
    )


def test_perfect_alignment():
    y = torch.tensor([0, 1, 2, 1, 0])
    v = analysis.label_vector(y, 3, torch.float64)
    centred = v - v.mean(1, keepdim=True)
    close(analysis.kernel_label_alignment(centred[:, :, None, None] * centred[None, None] + 0, y), 1)
    assert analysis.kernel_label_alignment(
        analysis.label_kernel(torch.zeros(4, dtype=torch.long), 3), torch.zeros(4, dtype=torch.long)
    ).isnan()


def test_group_alignment(case):
    k = nng.GramMatrix(case.model, case.loader)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 0], dtype=torch.bool)
    found = analysis.group_alignment(k, case.targets, {"easy": mask, "hard": torch.tensor([2, 4, 6])})
    sub = nng.GramMatrix(case.model, [(case.inputs[mask], case.targets[mask])])
    close(found["easy"], analysis.kernel_label_alignment(sub, case.targets[mask]))
    sub = nng.GramMatrix(case.model, [(case.inputs[~mask], case.targets[~mask])])
    close(found["hard"], analysis.kernel_label_alignment(sub, case.targets[~mask]))


def test_layer_kernels_add_up(case):
    k = nng.GramMatrix(case.model, case.loader)
    kernels = nng.GramMatrices(case.model, case.loader)
    close(sum(x.tensor for x in kernels.values()), k.tensor)
    close(sum(x.trace() for x in kernels.values()), k.trace())


class SeveralBlocks(nn.Module):
    """Layers of two blocks and of three: parameters that are used by operations of their own."""

    def __init__(self):
        super().__init__()
        self.two, self.three = nn.Module(), nn.Module()
        self.two.a, self.two.b = (nn.Parameter(torch.randn(3, 4)) for _ in range(2))
        self.three.a, self.three.b, self.three.c = (nn.Parameter(torch.randn(2, 3)) for _ in range(3))

    def forward(self, x):
        h = F.linear(x, self.two.a).tanh() + F.linear(x.sin(), self.two.b)
        return F.linear(h, self.three.a) + F.linear(h.cos(), self.three.b) + F.linear(h.tanh(), self.three.c)


@pytest.mark.parametrize("sizes", [(3,), (2, 1), (1, 1, 1)])
def test_the_kernel_of_a_layer_is_the_sum_over_its_blocks(sizes):
    torch.manual_seed(0)
    model, x = SeveralBlocks().double(), torch.randn(3, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 1])
    j = reference.jacobian(model, x)
    loader = list(zip(x.split(sizes), y.split(sizes)))
    side = Side.of(Run.of(model, loader), EveryOutput())
    found = analysis.label_alignment(model, loader, centered=False, by_layer=True)
    for layer, rows in (("two", j[..., :24]), ("three", j[..., 24:])):
        truth = torch.einsum("knd,lmd->knlm", rows, rows)
        with torch.no_grad():
            close(layer_kernel(side, layer, 2), truth)
        v = analysis.label_vector(y, 2, torch.float64)
        close(found[layer], torch.einsum("cn,cndm,dm->", v, truth, v) / (truth.norm() * v.square().sum()))


def test_pictures_of_kernels():
    k, phi = psd(6)
    m = analysis.normalised_gram(k)
    close(m.diagonal(), torch.ones(6))
    centred = phi[0] - phi[0].mean(0)
    close(analysis.kernel_pca(k, 2).square(), (centred @ torch.linalg.svd(centred)[2][:2].T).square())
    with pytest.raises(nng.ArgumentError, match="between 1 and 6"):
        analysis.kernel_pca(k, 7)


# -- eigenfunctions and steps ------------------------------------------------------------------------------------------


def test_eigenfunctions(case):
    found = analysis.eigenfunctions(case.model, case.loader, 4)
    values, vectors = nng.GramMatrix(case.model, case.loader).eigh()
    close(found.eigenvalues, values.flip(0)[:4])
    flat = found.functions.flatten(1)
    close(flat @ flat.T, torch.eye(4))
    close((flat @ vectors.flip(1)[:, :4]).abs(), torch.eye(4), 1e-7)
    again = analysis.eigenfunctions(case.model, case.loader, 4, at=case.loader)
    close(again.functions, found.functions, 1e-7)
    assert bool((flat.gather(1, flat.abs().argmax(1, keepdim=True)) > 0).all())


def test_nystrom_extension_is_the_principal_direction(case):
    """``u_J(x) = <v_J, Phi(x)> / sqrt(lambda_J)``."""
    new = build(case.name, sizes=(2,))
    for centered in (False, True):
        phi = case.jacobian
        mean = phi.mean(1, keepdim=True) if centered else 0
        found = analysis.eigenfunctions(case.model, case.loader, 3, at=new.loader, centered=centered)
        direction = torch.einsum("kcn,cnd->kd", found.sample, phi - mean) / found.eigenvalues.sqrt()[:, None]
        expected = torch.einsum("kd,cnd->kcn", direction, reference.jacobian(case.model, new.inputs) - mean)
        close(found.functions, expected / found.eigenvalues.sqrt()[:, None, None], 1e-7)


def test_perturbation_along_a_principal_direction():
    c = build("mlp")
    found = analysis.eigenfunctions(c.model, c.loader, 3)
    j = nng.Jacobian(c.model, c.loader).tensor
    before = c.model(c.inputs).detach()
    for value, u in zip(found.eigenvalues, found.functions):
        v = nng.PVector.from_flat(
            nng.LayerCollection.from_model(c.model), torch.einsum("cn,cnd->d", u, j) / value.sqrt()
        )
        close(v.norm(), 1)
        v.add_to(c.model, 1e-6)
        change = (c.model(c.inputs).detach() - before).norm()
        v.add_to(c.model, -1e-6)
        close(change / (1e-6 * value.sqrt()), 1, 1e-4)


def test_eigenfunctions_refuse():
    c = build("frozen", sizes=(4,))
    with pytest.raises(nng.ArgumentError, match="size of the kernel"):
        analysis.eigenfunctions(c.model, c.loader, 13)
    twice = [(c.inputs[[0, 0]], c.targets[[0, 0]])]
    with pytest.raises(nng.SingularError, match="smaller k"):
        analysis.eigenfunctions(c.model, twice, 6, at=c.loader)


def test_a_gradient_step_by_modes(case):
    """The change predicted mode by mode is right to first order, on the sample and off it; the model is put back."""
    new, before = build(case.name, sizes=(2, 2)), [p.detach().clone() for p in case.model.parameters()]
    errors = []
    for lr in (1e-3, 5e-4):
        s = analysis.step_modes(case.model, case.loader, lr, at=new.loader)
        close(torch.einsum("k,kcn->cn", s.predicted, s.functions), s.predicted_change)
        close(torch.einsum("k,kcn->cn", s.actual, s.functions), s.change)
        errors.append(((s.change - s.predicted_change).norm(), (s.elsewhere - s.predicted_elsewhere).norm()))
        assert s.residual < 0.01
    for coarse, fine in zip(*errors):
        assert 3.8 < coarse / fine < 4.2  # second order
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), before))


def test_linear_dynamics():
    k, _ = psd(5)
    start, y = torch.randn(1, 5, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    m = k.view(5, 5)
    lr = 1 / torch.linalg.eigvalsh(m)[-1]
    f = start.clone()
    for _ in range(7):
        f = f - lr * (f - y) @ m
    close(analysis.linear_dynamics(k, start, y, lr, 7), f)


# -- complexity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv2d", "attention"])
def test_complexity_measure(name):
    c = build(name)
    model = c.model
    measure = analysis.ComplexityMeasure(model, c.loader)
    assert measure.update() == 0 and measure.value == 0
    traces, norms = [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        traces.append(float(nng.GramMatrix(model, c.loader).trace()))
        old = nng.PVector.from_model(model)
        optimizer.zero_grad()
        F.cross_entropy(model(c.inputs), c.targets).backward()
        optimizer.step()
        norms.append(float((nng.PVector.from_model(model) - old).norm()))
        measure.update()
    expected = sum(m * math.sqrt(t) for m, t in zip(norms, traces))
    close(measure.value, expected)
    close(measure.normalized, expected / 7)
    close(analysis.flow_bound(norms, traces, 7), measure.normalized)
    resumed = analysis.ComplexityMeasure(model, c.loader)
    resumed.load_state_dict(measure.state_dict())
    assert resumed.value == measure.value and resumed.update() == 0
    held = analysis.ComplexityMeasure(model.train(), c.loader, every=2)
    assert model.training and held.examples == 7
    with pytest.raises(nng.ArgumentError, match="at least 1"):
        analysis.ComplexityMeasure(model, c.loader, every=0)


def test_norm_of_the_features_is_the_root_of_the_trace(case):
    close(case.jacobian.norm(), nng.GramMatrix(case.model, case.loader).trace().sqrt())


# -- Rademacher --------------------------------------------------------------------------------------------------------


def test_rademacher_of_linear_classes():
    k, phi = psd(8, rank=3)
    exact, bound = analysis.rademacher_complexity(k, 2.0), analysis.rademacher_bound(k, 2.0)
    assert bound / math.sqrt(2) <= exact <= bound
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 8)
    close(exact, 2.0 * (signs @ phi[0]).norm(dim=1).mean() / 8)
    estimate = analysis.rademacher_complexity(k, 2.0, "monte_carlo", 20_000, torch.Generator().manual_seed(0))
    assert abs(float(estimate) - float(exact)) < 4 * float(estimate.standard_error)
    close(bound, 2.0 / 8 * k.view(8, 8).trace().sqrt())
    with pytest.raises(nng.ArgumentError, match="monte_carlo"):
        analysis.rademacher_complexity(torch.eye(17), 1.0)
    with pytest.raises(nng.ArgumentError, match="several outputs"):
        analysis.rademacher_complexity(psd(3, c=2)[0], 1.0)
    with pytest.raises(nng.ArgumentError, match="one of each"):
        analysis.flow_bound([1.0], [1.0, 2.0], 3)


def test_flow_bound_holds():
    """``(1/n) E_s sum_t m_t sqrt(s^T K_t s)`` lies between the bound and its share ``1/sqrt(2)``."""
    kernels, norms = [psd(6, rank=4, seed=s)[0] for s in range(3)], [0.5, 1.0, 2.0]
    exact = sum(analysis.rademacher_complexity(k, m) for k, m in zip(kernels, norms))
    bound = analysis.flow_bound(norms, [float(k.view(6, 6).trace()) for k in kernels], 6)
    assert bound / math.sqrt(2) <= exact <= bound


def test_margins_and_their_bound():
    f = torch.tensor([[2.0, 1.0, 0.5], [0.0, 3.0, 4.0]])
    close(analysis.margins(f, torch.tensor([0, 1])), [1.0, -1.0])
    close(analysis.margins(torch.tensor([[2.0], [3.0]]), torch.tensor([1, 0])), [2.0, -3.0])
    close(analysis.ramp_loss(torch.tensor([-1.0, 0.0, 0.5, 2.0, 3.0]), 2.0), [1, 1, 0.75, 0, 0])
    k, _ = psd(5, c=3)
    per_class = sum(analysis.rademacher_bound(k[y, :, y], 2.0) for y in range(3))
    assert 3 / 0.5 * per_class <= analysis.margin_bound(k, 2.0, 0.5) + 1e-12  # Jensen
    close(analysis.margin_bound(k, 2.0, 0.5), 3**1.5 * 2 / (0.5 * 5) * k.view(15, 15).trace().sqrt())
    with pytest.raises(nng.ArgumentError, match="positive"):
        analysis.ramp_loss(f, 0)
    with pytest.raises(nng.ArgumentError, match="positive"):
        analysis.margin_bound(k, 1.0, -1)
    close(analysis.generalization_bound(0.1, 0.2, 50), 0.5 + 3 * math.sqrt(math.log(40) / 100))
    with pytest.raises(nng.ArgumentError, match="delta"):
        analysis.generalization_bound(0.1, 0.2, 50, delta=1)


def test_the_best_rescaling():
    """Proposition 14: ``(1/n) sum |u^T y|``, at ``nu = lambda / |u^T y|``, and no other scales are better."""
    k, _ = psd(7)
    y = torch.randn(7, dtype=torch.float64)
    values, u = torch.linalg.eigh(k.view(7, 7))
    c = (u.T @ y).abs()
    close(analysis.rescaled_bound(k, y), c.sum() / 7)
    close(analysis.rescaled_bound(nng.FMatDense(k), nng.FVector(y[None])), c.sum() / 7)
    rescaled = lambda nu: analysis.interpolation_bound((u * (values / nu)) @ u.T, y)
    close(rescaled(values / c), c.sum() / 7)
    close(analysis.interpolation_bound(k, y), analysis.rademacher_bound(k, analysis.interpolation_norm(k, y)))
    for _ in range(5):
        assert rescaled(values / c * torch.rand(7, dtype=torch.float64).add(0.5)) >= c.sum() / 7
    with pytest.raises(nng.ArgumentError, match="labels"):
        analysis.rescaled_bound(k, y[:3])


# -- SuperNat ----------------------------------------------------------------------------------------------------------


def test_supernat_without_rescaling_is_gradient_descent():
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    model, w = analysis.SuperNat(x, y, 0.3, kappa=None), torch.zeros(4, dtype=torch.float64)
    for _ in range(10):
        close(model.step(), (x @ w - y).square().mean() / 2)
        w = w - 0.3 * x.T @ (x @ w - y) / 9
    close(model.weights, w)
    close(model.predictions, x @ w)
    close(model.singular_values, torch.linalg.svdvals(x))


@pytest.mark.parametrize("kappa", ["max", "trace", 0.7])
def test_supernat_step_by_its_definition(kappa):
    """One step with explicit features: gradient step, then ``A = sum sqrt(nu) v v^T``, ``w <- A^T w``, ``Phi <- Phi
    A^-T``.
    """
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    model, phi, w = analysis.SuperNat(x, y, 0.3, kappa), x, torch.zeros(4, dtype=torch.float64)
    for _ in range(3):
        gradient = (phi @ w - y) / 9
        w = w - 0.3 * phi.T @ gradient
        u, s, vh = torch.linalg.svd(phi, full_matrices=False)
        g = (u.T @ gradient).abs()
        k = g.max() if kappa == "max" else (s.square() * g).sum() / s.square().sum() if kappa == "trace" else kappa
        a = vh.T @ (k / g).sqrt().diag() @ vh
        before = phi @ w
        w, phi = a.T @ w, phi @ torch.linalg.inv(a).T
        close(phi @ w, before)  # predictions unchanged
        model.step()
        close(model.predictions, before)
        close(x @ model.weights, before)
        close(model.singular_values.sort().values, torch.linalg.svdvals(phi).sort().values)
    if kappa == "trace":
        close(model.singular_values.square().sum(), x.square().sum())


def test_supernat_optimality():
    """Proposition 3: ``sqrt(sum nu l g^2 sum l / nu)`` is least, ``sum l |g|``, at ``nu = 1 / |g|``."""
    values, g = torch.rand(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64).abs()
    cost = lambda nu: ((nu * values * g.square()).sum() * (values / nu).sum()).sqrt()
    close(cost(1 / g), (values * g).sum())
    close(cost(5 / g), (values * g).sum())
    for _ in range(5):
        assert cost((1 + torch.rand(6, dtype=torch.float64)) / g) > (values * g).sum()


def test_supernat_at_rest_and_refused():
    x = torch.randn(5, 3, dtype=torch.float64)
    model = analysis.SuperNat(x, torch.zeros(5, dtype=torch.float64), 0.1)
    model.step()
    close(model.weights, torch.zeros(3))
    close(model.singular_values, torch.linalg.svdvals(x))
    nothing = analysis.SuperNat(0 * x, x[:, 0], 0.1)
    close(nothing.step(), x[:, 0].square().mean() / 2)
    close(nothing.weights, torch.zeros(3))
    for options in ({"kappa": "min"}, {"kappa": -1.0}):
        with pytest.raises(nng.ArgumentError, match="kappa"):
            analysis.SuperNat(x, x[:, 0], 0.1, **options)
    with pytest.raises(nng.ArgumentError, match="features"):
        analysis.SuperNat(x, x[:3, 0], 0.1)


def test_nothing_is_left_on_the_model(case):
    before = {n: (set(vars(m)), m.training) for n, m in case.model.named_modules()}
    analysis.step_modes(case.model, case.loader, 0.1)
    analysis.ComplexityMeasure(case.model, case.loader).update()
    assert before == {n: (set(vars(m)), m.training) for n, m in case.model.named_modules()}
    assert all(p.grad is None for p in case.model.parameters())


def test_nothing_left_after_centring():
    """One class, one example, or copies of one: an alignment of zero with zero has no value."""
    c = build("mlp")
    for x, y in (
        (c.inputs, torch.ones_like(c.targets)),
        (c.inputs[:1], c.targets[:1]),
        (c.inputs[[0, 0, 0]], torch.arange(3)),
    ):
        assert analysis.label_alignment(c.model, [(x, y)]).isnan()
        assert all(v.isnan() for v in analysis.label_alignment(c.model, [(x, y)], by_layer=True).values())
        assert analysis.kernel_label_alignment(nng.GramMatrix(c.model, [x]), y).isnan()
    assert (
        analysis.trace_ratios(torch.zeros(3), 1).isnan()
        and analysis.rescaled_bound(torch.zeros(4, 4), torch.ones(4)) == 0
    )


def test_one_example_and_linear_head():
    model = nn.Linear(3, 1).double()
    found = analysis.eigenfunctions(model, [torch.ones(1, 3, dtype=torch.float64)], 1)
    close(found.eigenvalues, [4.0])
    close(analysis.effective_rank(found.eigenvalues), 1)
