"""Natural-gradient optimizers: the step is the solve with the matrix, under every Fisher and in every block."""

import pytest
import torch
from cases import build, representation
from optimizing import EXACT, PRESETS, close, one_step
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, NaturalGradient
from nngeom.optim.packed import Packed

MODELS = [
    "mlp",
    "inplace",
    "conv1d",
    "conv2d",
    "sequence",
    "attention",
    "transformer",
    "language-model",
    "tied",
    "reused",
    "batch-norm",
    "time-first",
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_step_is_solve(name, preset):
    case = build(name, sizes=(5,))
    r, damping, make = PRESETS[preset]
    r = representation(r, case.model) if isinstance(r, str) else r
    opt = make(case.model, statistics_decay=0.0)
    for reduction in ("mean", "sum"):
        x, y = case.loader[0]
        fisher = nng.EmpiricalFIM(case.model, (x, y), r, loss="cross_entropy")
        g, step = one_step(opt, x, y, reduction)
        assert close(step, fisher.solve(g, damping))
        with torch.no_grad():  # a second step, elsewhere
            for p in case.model.parameters():
                p.mul_(0.9)
    assert not opt.observer.batchwise


@pytest.mark.parametrize("name", ["mlp", "conv2d", "attention"])
def test_exact_fisher(name):
    case = build(name, sizes=(5,))
    x, y = case.loader[0]
    opt = KFAC(case.model, damping=1e-2, fisher="exact", likelihood="categorical", **EXACT)
    fisher = nng.FIM(case.model, (x, y), nng.PMatKFAC)
    g, step = one_step(opt, x, y)
    assert close(step, fisher.solve(g, 1e-2))


def test_monte_carlo_fisher_is_unbiased_and_keyed():
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    opt = NaturalGradient(
        case.model,
        nng.PMatDense,
        lr=0.0,
        momentum=0.0,
        statistics_decay=0.999,
        fisher="monte_carlo",
        likelihood="categorical",
        damping=1e-2,
    )
    exact = nng.FIM(case.model, (x, y), nng.PMatDense).to_dense()
    for _ in range(250):
        one_step(opt, x, y)
    mean = next(iter(opt.partition.parts[0].averages.read().values()))["m"]
    assert float((mean - exact).norm() / exact.norm()) < 0.15
    assert opt.observer.drawn == 250 * 6  # every draw has a key of its own


def test_linear_regression_lands_on_least_squares():
    torch.manual_seed(0)
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    model = nn.Linear(4, 2).double()
    for kind in (nng.PMatKFAC, nng.PMatDense):
        nn.init.normal_(model.weight)
        opt = NaturalGradient(
            model, kind, lr=1.0, momentum=0.0, kl_clip=None, damping=1e-12, fisher="exact", likelihood="gaussian"
        )
        with opt.observe():
            (0.5 * (model(x) - y).square().sum(1).mean()).backward()
        opt.step()
        opt.zero_grad()
        best = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1), y).solution
        assert torch.allclose(torch.cat([model.weight, model.bias[:, None]], 1).T, best, atol=1e-8)


def test_running_scalings_follow_the_formula():
    case = build("mlp", sizes=(7,))
    x, y = case.loader[0]
    opt = EKFAC(case.model, lr=0.1, momentum=0.0, basis_every=3, scalings_decay=0.6, statistics_decay=0.0, kl_clip=None)
    expected, bases = {}, {}
    for turn in range(5):
        if turn % 3 == 0:  # a new basis: the spectrum starts from KFAC's
            kfac = nng.EmpiricalFIM(case.model, (x, y), nng.PMatKFAC, loss="cross_entropy")
            bases = {layout: block.eigen() for layout, block in kfac.blocks.items()}
            expected = {layout: block.d for layout, block in bases.items()}
        g, step = one_step(opt, x, y)
        for layout, block in bases.items():
            v = block.basis.tmv(layout.gather(g.flat()))
            expected[layout] = 0.6 * expected[layout] + 0.4 * 7 * v**2
            assert torch.allclose(opt.partition.parts[0].blocks[layout].d, expected[layout], rtol=1e-9, atol=1e-15)
            damped = expected[layout] + block.additive(1e-3)
            assert torch.allclose(layout.gather(step.flat()), 0.1 * block.basis.mv(v / damped), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("sua", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "conv2d",
        "depthwise",
        "deconv2d",
        "deconv3d",
        "language-model",
        "transformer",
        "tied",
        "experts",
        "einsum",
    ],
)
def test_packed_blocks_are_gathered_and_scattered_by_their_layouts(name, sua):
    case = build(name, sizes=(5,))
    layouts = list(nng.FIM(case.model, case.loader, nng.PMatKFAC.options(sua=sua)).blocks)
    vector = torch.randn(nng.LayerCollection.from_model(case.model).numel)
    before, expected = vector.clone(), vector.clone()
    packed = Packed(layouts, vector)
    packed.read()
    for layout, block in zip(layouts, packed.blocks):
        assert torch.equal(block, layout.gather(before))
        block.mul_(torch.arange(block.numel()).view(block.shape))
        layout.scatter_(expected, block)
    assert torch.equal(vector, before)
    packed.write()
    assert torch.equal(vector, expected)


def test_batchwise_parameters_get_n_times_the_squared_gradient():
    case = build("weight-norm", sizes=(5,))
    opt = KFAC(case.model, damping=1e-2, **EXACT)
    g, step = one_step(opt, *case.loader[0])
    assert all("original" in name for name in opt.observer.batchwise) and len(opt.observer.batchwise) == 2
    for name in opt.observer.batchwise:
        assert torch.allclose(step[name], g[name] / (5 * g[name].square() + 1e-2), rtol=1e-9)


def test_rest_takes_what_is_above_the_limit():
    case = build("language-model", sizes=(5,))
    opt = NaturalGradient(case.model, nng.PMatKFAC.options(block_limit=10), damping=1e-2, **EXACT)
    mixed = nng.PMatMixed({"position": nng.PMatDiag}, default=nng.PMatKFAC)
    fisher = nng.EmpiricalFIM(case.model, case.loader, mixed, loss="cross_entropy")
    g, step = one_step(opt, *case.loader[0])
    assert close(step, fisher.solve(g, 1e-2))


def test_sparse_embeddings_take_the_steps_of_dense_ones():
    """The weights after three observed steps, whether gradients of the table are sparse or not."""

    def trained(sparse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
        optimizer = nng.optim.EKFAC(model, lr=0.1)
        x, y = torch.randint(0, 7, (5, 3), generator=torch.Generator().manual_seed(1)), torch.arange(5) % 3
        for _ in range(3):
            with optimizer.observe():
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return nng.PVector.from_model(model).flat()

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-12, atol=1e-14)
