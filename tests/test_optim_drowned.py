"""Inverses of damped factors by their leading eigenvectors, and steps whose way of computing is counted."""

import copy
import io

import pytest
import torch
from optimizing import EXACT, close, one_step
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import KFAC
from nngeom.optim.descent import descend
from nngeom.optim.drowned import Drowned, drowned_inverse
from nngeom.optim.rank import BatchRank
from nngeom.pmat.kronecker import KroneckerBlock
from nngeom.pmat.shifted import factors_shifted

f64 = torch.float64
DAMPINGS = [
    nng.FactoredTikhonov(0.04, balanced=False),
    nng.FactoredTikhonov(0.04),
    nng.Relative(0.5, factored=True),
]


def decaying(side, rate, seed):
    """``[2, side, side]``: eigenvalues that decay by ``rate``, random eigenvectors."""
    u, _ = torch.linalg.qr(torch.randn(2, side, side, dtype=f64, generator=torch.Generator().manual_seed(seed)))
    return (u * rate ** -torch.arange(side, dtype=f64)) @ u.mT


def inverse_of(block, damping):
    """By dense inverses."""
    if isinstance(damping, nng.Relative):
        shifted = factors_shifted(block, damping.value**0.5)
        return torch.linalg.inv(shifted.a), torch.linalg.inv(shifted.g)
    return tuple(map(torch.linalg.inv, block.damped(damping)))


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("drowned", [0.3, 1e-2])
def test_every_direction_is_off_by_its_part_of_the_damping_at_most(damping, drowned):
    block = KroneckerBlock(decaying(300, 3.0, 0), decaying(200, 2.0, 1))
    made = drowned_inverse(block, damping, drowned)
    assert isinstance(made, Drowned) and len(made.a) == len(made.g) == 3
    for (z, w, u), expected in zip((made.a, made.g), inverse_of(block, damping)):
        inverse = z[:, None, None] * torch.eye(u.shape[-2], dtype=f64) + (u * w.unsqueeze(-2)) @ u.mT
        root = torch.linalg.cholesky(expected)
        ratios = torch.linalg.eigvalsh(torch.linalg.solve(root, torch.linalg.solve(root, inverse).mT))
        assert 1 / (1 + 1.01 * drowned) < float(ratios.min()) and float(ratios.max()) < 1 + 1.01 * drowned
        assert u.shape[-1] * 8 <= u.shape[-2] and float((ratios - 1).abs().max()) > 1e-3 * drowned
    x = torch.randn(2, 200, 300, dtype=f64)
    a, g = inverse_of(block, damping)
    assert close(made.product(x, None), g @ x @ a, (1 + drowned) ** 2 - 1)


def test_one_side_is_whole_where_its_spectrum_is_wide():
    block = KroneckerBlock(decaying(300, 1.01, 0), decaying(200, 2.0, 1))
    damping = nng.FactoredTikhonov(1e-2, balanced=False)
    made = drowned_inverse(block, damping, 0.1)
    assert isinstance(made, Drowned) and (len(made.a), len(made.g)) == (1, 3)
    torch.testing.assert_close(made.a[0], inverse_of(block, damping)[0])
    rows = torch.randn(5, 200, dtype=f64), torch.randn(5, 300, dtype=f64)
    one = Drowned((made.a[0][:1],), tuple(t[:1] for t in made.g))
    through_rows, dense = one.product(None, rows), one.product((rows[0].T @ rows[1])[None], None)
    torch.testing.assert_close(through_rows, dense)
    assert one.costs == (2 * 200 * made.g[2].shape[-1], 300**2)


@pytest.mark.parametrize(
    ("block", "damping"),
    [
        (KroneckerBlock(decaying(300, 1.01, 0), decaying(200, 1.01, 1)), nng.FactoredTikhonov(1e-2, balanced=False)),
        (KroneckerBlock(decaying(300, 3.0, 0), decaying(200, 3.0, 1)), nng.core.damping.Tikhonov(1e-2)),
        (KroneckerBlock(decaying(300, 3.0, 0), decaying(200, 3.0, 1)), nng.FactoredTikhonov(0.0, balanced=False)),
        (KroneckerBlock(decaying(60, 3.0, 0), decaying(50, 3.0, 1)), nng.FactoredTikhonov(1e-2)),
        (KroneckerBlock(torch.rand(2, 300, dtype=f64), torch.rand(2, 200, dtype=f64)), nng.FactoredTikhonov(1e-2)),
    ],
)
def test_nothing_is_drowned_where_that_is_no_gain_or_damping_is_exact(block, damping):
    assert drowned_inverse(block, damping, 0.1) is None


def net(inputs=300, outputs=200):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh(), nn.Linear(outputs, 3)).double()


def batch(seed, n=64, inputs=300):
    """Inputs of few directions."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, dtype=f64, generator=g) @ torch.randn(4, inputs, dtype=f64, generator=g)
    return x / 2, torch.randint(0, 3, (n,), generator=g)


def test_what_is_drowned_changes_steps_of_kfac_by_less_than_its_part_of_the_damping():
    steps = {}
    for drowned in (0.0, 0.1):
        opt = KFAC(net(), drowned=drowned, **EXACT)
        _, steps[drowned] = one_step(opt, *batch(0))
        blocks = next(iter(opt.partition)).blocks
        assert any(isinstance(b, Drowned) for b in blocks.values()) == (drowned > 0)
    assert 1e-9 < float((steps[0.1] - steps[0.0]).norm() / steps[0.0].norm()) < 0.21


def train(opt, steps):
    for step in steps:
        x, y = batch(step)
        opt.zero_grad()
        with opt.observe("mean"):
            F.cross_entropy(opt.observer.network.model(x), y).backward()
        opt.step()


@pytest.mark.parametrize("drowned", [0.0, 0.1])
def test_training_goes_on_bit_by_bit_where_products_go_through_rows(drowned, monkeypatch):
    used = []
    of = BatchRank.of
    monkeypatch.setattr(BatchRank, "of", lambda self, *x: used.append(of(self, *x)) or used[-1])
    model = net()
    make = lambda m: KFAC(m, lr=0.01, inverse_every=4, statistics_every=4, drowned=drowned)
    opt = make(model)
    train(opt, range(6))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    resumed = make(other)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    used.clear()
    train(opt, range(6, 10))
    mine = [rows is None for rows in used]
    used.clear()
    train(resumed, range(6, 10))
    assert [rows is None for rows in used] == mine and (drowned > 0 or not all(mine))
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_a_state_without_counts_of_rows_loads():
    opt = KFAC(net())
    train(opt, range(2))
    state = opt.state_dict()
    for part in state["curvature"]["parts"].values():
        del part["rank"]
    KFAC(net()).load_state_dict(state)


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_what_counts_as_drowned_is_checked(bad):
    with pytest.raises(nng.ArgumentError, match="drowned"):
        KFAC(net(), drowned=bad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_momentum_in_one_pass_and_in_several(layout, decay):
    torch.manual_seed(0)
    p, v = torch.randn(4, 3, 2, 2, dtype=f64), torch.randn(2, 4, 3, 2, 2, dtype=f64)
    parameter = nn.Parameter(p.clone().contiguous(memory_format=layout))
    groups, state = [{"params": [parameter], "lr": 0.1, "momentum": 0.9, "weight_decay": decay}], {parameter: {}}
    buffer, expected = torch.zeros_like(p), p.clone()
    with torch.no_grad():
        for step in range(2):
            parameter.grad = v[step].clone()
            descend(groups, state, step, None, None)
            buffer = 0.9 * buffer + v[step]
            expected = expected * (1 - 0.1 * decay) - 0.1 * buffer
    torch.testing.assert_close(parameter.data, expected)
    torch.testing.assert_close(state[parameter]["momentum_buffer"], buffer)
