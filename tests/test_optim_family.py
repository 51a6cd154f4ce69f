"""Optimizers in eigenbases: every spectrum, damping and way of computing is a matrix that can be written down."""

import copy
import io
import warnings

import pytest
import torch
from cases import build
from optimizing import EXACT, close, gradient, one_step
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, SOAP, NaturalGradient
from nngeom.optim.heads import Head, Leading
from nngeom.optim.rank import BatchRank
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.shifted import factors_shifted

f64 = torch.float64
BATCH = dict(basis_every=1, scalings="batch", refresh="eigh", statistics_decay=0.0, **EXACT)


def wide(batch=8, inputs=100, outputs=90):
    """Sides above those that are kept whole, and products that are cheaper through the rank of the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh(), nn.Linear(outputs, 3)).double()
    return model, torch.randn(batch, inputs, dtype=f64), torch.arange(batch) % 3


def factors_damped(block, x):
    """``(A + sqrt(x) tr A / dim A) (x) (G + sqrt(x) tr G / dim G)`` of one group as a dense matrix."""
    a, g = (torch.diag_embed(f)[0] if f.ndim == 2 else f[0] for f in (block.a, block.g))
    plus = lambda m: m + x**0.5 * m.diagonal().mean() * torch.eye(len(m), dtype=f64)
    return torch.kron(plus(g), plus(a))


@pytest.mark.parametrize("name", ["mlp", "sequence", "attention", "language-model"])
def test_relative_damping_of_factors(name):
    case = build(name)
    kfac = nng.FIM(case.model, case.loader, nng.PMatKFAC)
    b = nng.PVector.randn(kfac.layer_collection, dtype=f64)
    damping = nng.Relative(0.01, factored=True)
    kfac_solution, ekfac = kfac.solve(b, damping), nng.FIM(case.model, case.loader, nng.PMatEKFAC)
    ekfac_solution = ekfac.solve(b, damping)
    compared = 0
    for layout, block in kfac.blocks.items():
        s, o, i = layout.sizes
        if s > 1 or o == 1:
            continue
        compared += 1
        v, dense = layout.gather(b.flat()).flatten(), factors_damped(block, 0.01)
        expected = torch.linalg.solve(dense, v).view(1, o, i)
        torch.testing.assert_close(layout.gather(kfac_solution.flat()), expected, rtol=1e-7, atol=1e-9)
        eigen = ekfac.blocks[layout]
        plain = torch.kron(*(torch.diag_embed(f)[0] if f.ndim == 2 else f[0] for f in (block.g, block.a)))
        shifted = eigen.dense() + dense - plain  # the additive form: what damping adds to the product
        expected = torch.linalg.solve(shifted, v).view(1, o, i)
        torch.testing.assert_close(layout.gather(ekfac_solution.flat()), expected, rtol=1e-7, atol=1e-9)
    assert compared > 1


@pytest.mark.parametrize("damping", [nng.Relative(0.1), nng.Relative(0.1, factored=True)], ids=["plain", "factored"])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer", "tied"])
def test_a_step_under_relative_damping_is_the_solve(name, damping):
    case = build(name, sizes=(5,))
    x, y = case.loader[0]
    for opt, kind in (
        (EKFAC(case.model, damping=damping, **BATCH), nng.PMatEKFAC),
        (KFAC(case.model, damping=damping, inverse_every=1, statistics_decay=0.0, **EXACT), nng.PMatKFAC),
    ):
        fisher = nng.EmpiricalFIM(case.model, (x, y), kind, loss="cross_entropy")
        g, step = one_step(opt, x, y)
        assert close(step, fisher.solve(g, damping))


@pytest.mark.parametrize("name", ["mlp", "conv2d", "language-model"])
def test_steps_by_other_functions_of_the_spectrum(name):
    case = build(name, sizes=(5,))
    x, y = case.loader[0]
    measured = lambda kind: nng.EmpiricalFIM(case.model, (x, y), kind, loss="cross_entropy")
    root = measured(nng.PMatEKFAC).power(-0.5, damping=1e-2)
    g, step = one_step(EKFAC(case.model, damping=1e-2, power=0.5, **BATCH), x, y)
    assert close(step, root.mv(g))
    cut, ekfac = nng.Cutoff(top=7), measured(nng.PMatEKFAC)
    g, step = one_step(EKFAC(case.model, damping=cut, **BATCH), x, y)
    assert close(step, ekfac.solve(g, cut))
    kfac = measured(nng.PMatKFAC)
    g, step = one_step(EKFAC(case.model, damping=1e-2, **(BATCH | {"scalings": "factors"})), x, y)
    assert close(step, kfac.solve(g, 1e-2))


class Adam:
    """The moments of one layer ``[o, i]`` in the basis of ``(A, G)``, the first kept in the parameters' own."""

    def __init__(self):
        self.m = self.v = self.ua = self.ug = None

    def direction(self, v, a, g, turn, step):
        b1, b2, eps = 0.9, 0.95, 1e-8
        self.m = (1 - b1) * v if self.m is None else b1 * self.m + (1 - b1) * v
        if turn:
            ua, ug = torch.linalg.eigh(a)[1], torch.linalg.eigh(g)[1]
            if self.v is not None:
                self.v = (ug.T @ self.ug) ** 2 @ self.v @ ((self.ua.T @ ua) ** 2)
            self.ua, self.ug = ua, ug
        square = (self.ug.T @ v @ self.ua) ** 2
        self.v = (1 - b2) * square if self.v is None else b2 * self.v + (1 - b2) * square
        m = self.ug.T @ self.m @ self.ua / (1 - b1**step)
        return self.ug @ (m / ((self.v / (1 - b2**step)).sqrt() + eps)) @ self.ua.T


@pytest.mark.parametrize("factors", ["rows", "gradients"])
def test_adam_in_the_eigenbasis(factors):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6)).double()  # no factor has two zero eigenvalues
    opt = SOAP(model, lr=0.1, factors=factors, basis_every=3, statistics_every=1, statistics_decay=0.6)
    moments, averages = [Adam(), Adam()], [None, None]
    for step in range(1, 9):
        x, y = torch.randn(20, 4, dtype=f64), torch.randn(20, 6, dtype=f64)
        layers, inputs = (model[0], model[2]), (x, model[:2](x).detach())
        opt.zero_grad()
        with opt.observe():
            (0.5 * (model(x) - y).square().sum(1).mean()).backward()
        before = [torch.cat([m.weight, m.bias[:, None]], 1).detach().clone() for m in layers]
        expected = []
        for j, m in enumerate(layers):
            v = torch.cat([m.weight.grad, m.bias.grad[:, None]], 1)
            if factors == "gradients":
                pair = (v.T @ v / v.square().sum(), 20 * v @ v.T)
            else:
                a = torch.cat([inputs[j], torch.ones(20, 1, dtype=f64)], 1)
                pair = (a.T @ a / 20, output_moments(model, x, y, j))
            old = averages[j]
            averages[j] = pair if old is None else tuple(0.6 * p + 0.4 * q for p, q in zip(old, pair))
            if old is None:
                averages[j] = tuple(0.4 * p for p in pair)
            expected.append(moments[j].direction(v, *averages[j], turn=step % 3 == 1, step=step))
        opt.step()
        for m, was, d in zip(layers, before, expected):
            torch.testing.assert_close((was - torch.cat([m.weight, m.bias[:, None]], 1)) / 0.1, d, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["transformer", "language-model", "gru", "tied", "reused", "conv2d"])
def test_parameters_without_factors_take_the_steps_of_adam(name):
    """Norms and a table of positions, beside layers of any kind in eigenbases."""
    case = build(name)
    norms = {at for at, m in case.model.named_modules() if isinstance(m, nn.LayerNorm)}
    named = dict(case.model.named_parameters())
    plain = {n: p for n, p in named.items() if n == "position" or n.rpartition(".")[0] in norms}
    assert bool(plain) == (name in ("transformer", "language-model"))
    opt, kept = SOAP(case.model, lr=0.1, basis_every=2), {n: [torch.zeros_like(p)] * 2 for n, p in plain.items()}
    for step in range(1, 6):
        batch, before = case.loader[step % len(case.loader)], copy.deepcopy(case.model.state_dict())
        opt.zero_grad()
        with opt.observe():
            F.cross_entropy(case.model(batch[0]), batch[1]).backward()
        grads = {n: p.grad.clone() for n, p in plain.items()}
        opt.step()
        for n, p in plain.items():
            m, v = kept[n] = [0.9 * kept[n][0] + 0.1 * grads[n], 0.95 * kept[n][1] + 0.05 * grads[n] ** 2]
            expected = 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
            torch.testing.assert_close(before[n] - p.detach(), expected, rtol=1e-6, atol=1e-8)
        assert any(not torch.equal(before[n], p) for n, p in case.model.named_parameters() if n not in plain)
    assert all(bool(p.isfinite().all()) for p in case.model.parameters())


@pytest.mark.parametrize("factors", ["rows", "gradients"])
def test_rows_are_followed_until_the_factors_of_gradients_are_known(factors, monkeypatch):
    case, taken = build("mlp"), []
    opt = SOAP(case.model, factors=factors, statistics_every=1)
    monkeypatch.setattr(
        opt.partition, "observe", lambda *args, real=opt.partition.observe: (taken.append(1), real(*args))
    )
    for _ in range(4):
        one_step(opt, *case.loader[0])
    assert bool(taken[1:]) == (factors == "rows")


def output_moments(model, x, y, layer):
    """Second moments of the gradients of single examples' losses in the outputs of a layer."""
    rows = []
    for n in range(len(x)):
        h = [model[0](x[n : n + 1])]
        h.append(model[2](h[0].tanh()))
        rows.append(torch.autograd.grad(0.5 * (h[1] - y[n]).square().sum(), h[layer])[0][0])
    return torch.stack(rows).T @ torch.stack(rows) / len(x)


def stepped_factor(side, leading, generator):
    """Of eigenvalues that fall, and all alike after the leading ones."""
    u, _ = torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=f64))
    values = torch.full((side,), 1e-3, dtype=f64)
    values[:leading] = torch.linspace(5, 1, leading, dtype=f64)
    return (u * values) @ u.T


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("damping", [nng.FactoredTikhonov(0.04, balanced=False), nng.Relative(0.2, factored=True)])
def test_a_leading_part_is_the_whole_where_the_tail_is_flat(damping, exact):
    generator = torch.Generator().manual_seed(0)
    block = KroneckerBlock(stepped_factor(90, 12, generator)[None], stepped_factor(75, 9, generator)[None])
    head = Leading(0.1, 64, exact).of(block, damping, None)
    for _ in range(30 if not exact else 0):  # orthogonal iteration converges
        head = Leading(0.1, 64, exact).of(block, damping, head)
    assert isinstance(head, Head) and head.d.shape == (1, 9, 12)
    d, a = torch.randn(6, 75, dtype=f64, generator=generator), torch.randn(6, 90, dtype=f64, generator=generator)
    v = (d.T @ a)[None]
    if isinstance(damping, nng.Relative):
        expected = factors_shifted(block, damping.value**0.5).solve(v, nng.FactoredTikhonov(0.0, balanced=False))
    else:
        expected = block.solve(v, damping)
    for rows in (None, (d, a)):
        parts = head.down(v, rows, head.large(damping, 1.0))
        inside, found = parts.inside / (head.d + head.shift(damping)), torch.empty_like(v)
        head.up(parts, inside, head.inverse(damping, 1.0), found)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_rounding_leaves_nothing_of_eigenvectors_that_stand_out():
    generator, damping = torch.Generator().manual_seed(0), nng.FactoredTikhonov(1e-3, balanced=False)
    factors = [stepped_factor(side, 6, generator) for side in (200, 180)]
    tops = []
    for factor in factors:
        _, vectors = torch.linalg.eigh(factor)
        factor += 1e3 * torch.outer(vectors[:, -1], vectors[:, -1])
        tops.append(vectors[:, -1])
    head = Leading(0.1, 64, exact=True).of(KroneckerBlock(*(f[None] for f in factors)), damping, None)
    rows = [torch.randn(9, len(u), generator=generator, dtype=f64) + 1e4 * u for u in reversed(tops)]

    def preconditioned(dtype, large):
        cast, (d, a) = head.to(dtype), (x.to(dtype) for x in rows)
        parts, out = cast.down((d.T @ a)[None], (d, a), large), torch.empty(1, 180, 200, dtype=dtype)
        inside = parts.inside / (cast.d + cast.shift(damping))
        cast.up(parts, inside, cast.inverse(damping, 1.0), out)
        return out[0].double() @ tops[0], tops[1] @ out[0].double()

    large = head.to(torch.float32).large(damping, 1.0)
    assert large == (1, 1) and head.large(damping, 1.0) == (0, 0)
    error = lambda found: max(float((x - y).norm() / y.norm()) for x, y in zip(found, preconditioned(f64, large)))
    assert error(preconditioned(torch.float32, large)) < 2e-4 < error(preconditioned(torch.float32, (0, 0)))


def test_what_is_drowned_changes_steps_by_less_than_its_part_of_the_damping():
    steps = {}
    for drowned in (0.0, 1e-9, 0.1):
        model, x, y = wide(batch=300)
        opt = EKFAC(model, drowned=drowned, refresh="eigh", **EXACT)
        _, steps[drowned] = one_step(opt, x, y)
        kinds = [type(b).__name__ for b in next(iter(opt.partition)).blocks.values()]
        assert ("Head" in kinds) == (drowned == 0.1)
    assert close(steps[1e-9], steps[0.0], 1e-9)
    error = float((steps[0.1] - steps[0.0]).norm() / steps[0.0].norm())
    assert 1e-9 < error < 0.2


def test_second_moments_of_examples_along_leading_eigenvectors():
    model, x, y = wide(batch=300)
    opt = EKFAC(model, scalings="batch", refresh="eigh", **EXACT)
    _, moved = one_step(opt, x, y)
    layout, block = next((layout, b) for layout, b in next(iter(opt.partition)).blocks.items() if isinstance(b, Head))
    assert layout.names == ("0.weight", "0.bias") and float(moved.norm()) > 0
    before, _, _ = wide(batch=300)
    parameters = {name: p.detach() for name, p in before.named_parameters()}
    one = lambda p, a, b: F.cross_entropy(torch.func.functional_call(before, p, (a[None],)), b[None])
    rows = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(parameters, x, y)
    r = torch.cat([rows["0.weight"], rows["0.bias"].unsqueeze(-1)], -1)
    expected = (block.ug[0].T @ r @ block.ua[0]).square().mean(0)
    torch.testing.assert_close(block.d[0], expected, rtol=1e-9, atol=1e-15)


def test_products_go_through_the_rank_of_the_batch_where_rows_are_the_gradient(monkeypatch):
    found = []
    of = BatchRank.of
    monkeypatch.setattr(BatchRank, "of", lambda self, *x: found.append(of(self, *x)) or found[-1])
    model, x, y = wide(inputs=150, outputs=120)
    fisher = lambda kind: nng.EmpiricalFIM(model, (x, y), kind, loss="cross_entropy")
    penalty = lambda: sum(p.square().sum() for p in model.parameters())
    for opt, kind, damping in (
        (
            KFAC(model, inverse_every=1, statistics_decay=0.0, drowned=0.0, **EXACT),
            nng.PMatKFAC,
            nng.FactoredTikhonov(1e-2, balanced=False),
        ),
        (EKFAC(model, damping=1e-2, **BATCH), nng.PMatEKFAC, 1e-2),
    ):
        for change, used in (("none", True), ("clipped", True), ("penalty", False), ("parts", True)):
            matrix = fisher(kind)
            opt.zero_grad()
            with opt.observe():
                halves = [(x[:4], y[:4]), (x[4:], y[4:])] if change == "parts" else [(x, y)]
                for part, target in halves:
                    (F.cross_entropy(model(part), target, reduction="sum") / 8).backward()
            if change == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            if change == "penalty":
                penalty().backward()
            g, before = gradient(opt), nng.PVector.from_model(model)
            found.clear()
            opt.step()
            assert any(rows is not None for rows in found) == used, change
            assert close(before - nng.PVector.from_model(model), matrix.solve(g, damping)), change
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: SOAP(m, factors="rows", basis_every=2),
        lambda m: SOAP(m, basis_every=2, statistics_every=1),
        lambda m: EKFAC(m, basis_every=2, damping=nng.Relative(0.1, factored=True)),
        lambda m: EKFAC(m, basis_every=2, scalings="factors", factors="gradients", power=0.5),
    ],
    ids=["soap of rows", "soap", "heads", "shampoo"],
)
def test_resuming_is_bitwise(make):
    model, x, y = wide()
    opt = make(model)
    for _ in range(3):
        one_step(opt, x, y)
    again = copy.deepcopy(model)
    second, file = make(again), io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for each in (opt, second):
        for _ in range(3):
            one_step(each, x, y)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_steps_are_bounded_by_default():
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    fisher = nng.EmpiricalFIM(case.model, (x, y), nng.PMatDense, loss="cross_entropy").to_dense()
    opt = NaturalGradient(case.model, nng.PMatDense, lr=0.5, momentum=0.0, damping=0.1)
    _, step = one_step(opt, x, y)
    divergence = 0.5 * step.flat() @ (fisher + 0.1 * torch.eye(43, dtype=f64)) @ step.flat()
    assert float(divergence) == pytest.approx(1e-4, rel=1e-9)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(case.model.parameters(), (0.5, 0.1, 0.2, 0.3))]
    opt = NaturalGradient(case.model, nng.PMatDiag, momentum=0.0, damping=0.1, params=groups)
    diagonal = nng.EmpiricalFIM(case.model, (x, y), nng.PMatDiag, loss="cross_entropy").diag().flat()
    _, step = one_step(opt, x, y)
    assert float(0.5 * (step.flat() ** 2 * (diagonal + 0.1)).sum()) == pytest.approx(1e-4, rel=1e-9)


def regression(reduction):
    """Steps at the full rate on a least-squares problem, with the losses said to be reduced in one way or another."""
    torch.manual_seed(0)
    x, model = torch.randn(60, 4, dtype=f64), nn.Linear(4, 2).double()
    y = x @ torch.randn(4, 2, dtype=f64) + torch.randn(60, 2, dtype=f64)
    opt = NaturalGradient(model, nng.PMatDense, lr=0.3, momentum=0.0, damping=1e-4, kl_clip=None)
    for _ in range(15):
        opt.zero_grad()
        with opt.observe(reduction):
            (0.5 * (model(x) - y).square().sum(1).mean()).backward()
        opt.step()


def test_a_quadratic_model_that_is_wrong_warns_once():
    with pytest.warns(nng.optim.QuadraticModelWarning, match="kl_clip") as caught:
        regression("sum")  # second moments 60^2 times too small
    assert sum(issubclass(w.category, nng.optim.QuadraticModelWarning) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regression("mean")


def test_parameters_above_the_limit_go_to_the_rest():
    case = build("language-model", sizes=(5,))
    for make in (EKFAC, KFAC):
        opt = make(case.model, block_limit=10)
        one_step(opt, *case.loader[0])
        assert [part.selection.names for part in opt.partition if part.manner.eager] == [("position",)]


@pytest.mark.parametrize(
    "options",
    [
        {"factors": "inputs"},
        {"refresh": "never"},
        {"power": 0.0},
        {"power": 2.0},
        {"power": True},
        {"drowned": -1.0},
        {"first_decay": 1.0},
        {"scalings": "shampoo"},
        {"factors": "gradients", "scalings": "batch"},
        {"factors": "gradients", "fisher": "exact", "likelihood": "categorical"},
        {"damping": nng.Relative(-1.0)},
    ],
    ids=str,
)
def test_what_is_refused(options):
    with pytest.raises((nng.ArgumentError, nng.DampingError)):
        EKFAC(build("mlp").model, **options)


def test_the_largest_eigenvalues_are_those_of_eigenbases():
    case = build("mlp", sizes=(6,))
    opt = KFAC(case.model, damping=nng.Cutoff(top=3))
    with pytest.raises(nng.UnsupportedError, match="EKFAC"):
        one_step(opt, *case.loader[0])


def test_a_sum_has_no_factors_to_damp():
    case = build("mlp")
    total = nng.FIM(case.model, case.loader, nng.PMatDense) + nng.FIM(case.model, case.loader, nng.PMatKFAC)
    with pytest.raises(nng.ArgumentError, match="sum"):
        total.solve(nng.PVector.randn(total.layer_collection, dtype=f64), nng.Relative(0.1, factored=True))


def test_rows_of_a_metric_are_not_kept_for_products():
    model, x, y = wide(inputs=150, outputs=120)
    for options, kept in (({}, True), ({"fisher": "monte_carlo", "likelihood": "categorical"}, False)):
        opt = KFAC(model, **options)
        one_step(opt, x, y)
        assert opt.partition.wants_every_batch == kept
