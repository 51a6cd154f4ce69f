"""Damping by the variance of examples: against loops over per-example gradients, and against the best there is."""

import pytest
import torch
from cases import build
from optimizing import EXACT, close, one_step
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, SOAP, NaturalGradient, VarianceDamping
from nngeom.optim.variance_damping import Signal

f64 = torch.float64
OPTIONS = dict(basis_every=100, statistics_every=100, scalings="batch", refresh="eigh", drowned=0.0, **EXACT)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(count, n=6):
    torch.manual_seed(1)
    return [(torch.randn(n, 4, dtype=f64), torch.randint(0, 3, (n,))) for _ in range(count)]


def examples_gradients(model, x, y):
    """``{layer: [n, o, i]}``, biases as the last column."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, a, b):
        return F.cross_entropy(functional_call(model, parameters, (a[None],)), b[None])

    rows = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    return {q: torch.cat([rows[f"{q}.weight"], rows[f"{q}.bias"].unsqueeze(-1)], -1) for q in ("0", "2")}


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps_are_those_of_the_formula(factored, decay, reduction):
    rule, model = VarianceDamping(0.1, decay=decay, least=0.05, factored=factored), net()
    opt, means = EKFAC(model, damping=rule, **OPTIONS), {}
    for x, y in batches(4):
        rows = examples_gradients(model, x, y)
        _, moved = one_step(opt, x, y, reduction)
        for layout, block in next(iter(opt.partition)).blocks.items():
            name = layout.names[0].split(".")[0]
            r = block.ug[0].T @ rows[name] @ block.ua[0]
            v, d, n = r.mean(0), r.square().mean(0), len(x)
            variance = r.var(0, unbiased=True) / n
            old = means.get(name, (0.0, [torch.zeros_like(v)] * 4))
            new = [v**2, variance, d, d**2]
            means[name] = decay * old[0] + 1 - decay, [decay * a + (1 - decay) * b for a, b in zip(old[1], new)]
            mean_v, mean_n, mean_d, mean_q = (t / means[name][0] for t in means[name][1])
            share = (1 - mean_n / mean_v).clamp(0.05, 1) * mean_d**2 / mean_q
            added = 0.1 + (0.1**0.5 * (block.sa[0][None] + block.sg[0][:, None]) if factored else 0)
            step = block.ug[0] @ (share * v / (d + added)) @ block.ua[0].T
            c = 1 if reduction == "mean" else n
            torch.testing.assert_close(layout.gather(moved.flat())[0], c * step, rtol=1e-8, atol=1e-10)


def test_shares_come_near_the_best_ones():
    """Of all multiples of ``v / d`` the expected fall of the quadratic model is largest at about the shares."""
    generator = torch.Generator().manual_seed(0)
    n, h = 20, 2.0
    g, s = torch.logspace(-3, 1, 9, dtype=f64), torch.ones(9, dtype=f64)
    signal, falls = Signal(), {"plain": 0.0, "shares": 0.0}
    best = g**4 / (g**2 + s**2 / n) / h / 2  # of c = g^2 / (h E v^2)
    for step in range(4000):
        rows = g + s * torch.randn(n, 9, dtype=f64, generator=generator)
        v = rows.mean(0)
        signal.follow(v, rows.square().mean(0), n, 0.99)
        if step > 500:
            for name, c in (("plain", 1.0), ("shares", signal.share(1e-6))):
                falls[name] += (g * c * v / h - h * (c * v / h) ** 2 / 2) / 3499
    assert bool((falls["plain"][:3] < 0).all())  # noise alone climbs
    assert float(falls["shares"].sum()) > 0.97 * float(best.sum())
    assert bool((falls["shares"] > falls["plain"] - 0.01 * best).all())


def test_where_examples_agree_nothing_is_shortened():
    signal, v = Signal(), torch.tensor([0.5, -2.0, 0.0], dtype=f64)
    signal.follow(v, v.square(), 10, 0.9)
    torch.testing.assert_close(signal.share(0.01), torch.tensor([1.0, 1.0, 1.0], dtype=f64))


@pytest.mark.parametrize("name", ["conv2d", "language-model", "attention", "tied"])
def test_a_step_of_which_all_is_kept_is_that_of_the_damping_alone(name):
    steps = []
    for damping in (VarianceDamping(0.1, least=1.0, decay=0.0), nng.FactoredTikhonov(0.1, balanced=False)):
        case = build(name)
        opt = EKFAC(case.model, damping=damping, reduction="mean", **OPTIONS)
        with opt.observe():
            F.cross_entropy(case.model(case.inputs).flatten(0, -2), case.targets.flatten()).backward()
        before = nng.PVector.from_model(case.model)
        opt.step()
        steps.append(before - nng.PVector.from_model(case.model))
    assert close(steps[0], steps[1], 1e-9)


def test_resuming_goes_on_bit_by_bit():
    models = [net(), net()]
    opts = [EKFAC(m, damping=VarianceDamping(), **OPTIONS) for m in models]
    data = batches(5)
    for x, y in data[:3]:
        one_step(opts[0], x, y)
    models[1].load_state_dict(models[0].state_dict())
    opts[1].load_state_dict(opts[0].state_dict())
    for opt in opts:
        for x, y in data[3:]:
            one_step(opt, x, y)
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(p, q)


def test_new_bases_start_anew():
    opt = EKFAC(net(), damping=VarianceDamping(), **{**OPTIONS, "basis_every": 2})
    weights = []
    for x, y in batches(3):
        one_step(opt, x, y)
        weights.append(next(iter(opt.partition)).signal.weight)
    assert weights == pytest.approx([0.1, 0.19, 0.1])


@pytest.mark.parametrize(
    "make",
    [
        lambda m: EKFAC(m, damping=VarianceDamping()),
        lambda m: EKFAC(m, damping=VarianceDamping(), scalings="factors"),
        lambda m: EKFAC(m, damping=VarianceDamping(), scalings="batch", fisher="monte_carlo", likelihood="categorical"),
        lambda m: KFAC(m, damping=VarianceDamping()),
        lambda m: NaturalGradient(m, nng.PMatDiag, damping=VarianceDamping()),
        lambda m: NaturalGradient(
            m, nng.PMatMixed({"0": nng.PMatEKFAC}, default=nng.PMatDiag), damping=VarianceDamping()
        ),
    ],
)
def test_it_is_refused_where_variances_are_not_known(make):
    with pytest.raises(nng.ArgumentError, match="scalings='batch'"):
        make(net())


def test_it_is_refused_when_set_later():
    opt = SOAP(net())
    opt.damping = VarianceDamping()
    with pytest.raises(nng.ArgumentError, match="scalings='batch'"):
        one_step(opt, *batches(1)[0])


def test_a_single_example_has_no_variance():
    opt = EKFAC(net(), damping=VarianceDamping(), **OPTIONS)
    with pytest.raises(nng.ArgumentError, match="2 or more"):
        one_step(opt, *batches(1, n=1)[0])
    opt = EKFAC(net(), damping=VarianceDamping(), **OPTIONS)
    one_step(opt, *batches(1)[0])
    known = next(iter(opt.partition)).signal.means.clone()
    one_step(opt, *batches(1, n=1)[0])
    assert torch.equal(next(iter(opt.partition)).signal.means, known)


@pytest.mark.parametrize(
    "bad", [{"value": -1.0}, {"value": float("nan")}, {"decay": 1.0}, {"least": 0.0}, {"least": 2}]
)
def test_numbers_out_of_range(bad):
    with pytest.raises(nng.ArgumentError, match="expected"):
        VarianceDamping(**bad)
