"""What examples on images are made of: penalties and schedules, masked nets, backgrounds, permutations, descents."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import alignment_difficult
import lazy_background
import lazy_minibatches
import mgs_circles
import mgs_common
import mgs_dropout
import permuted_mnist
from geometry_common import Data, batches

import nngeom as nng
from nngeom import mgs


def _rows(model, x, outputs):
    """``(n c, d)`` by autograd, one output of one input after the other; ``outputs(model, x)``."""
    weights = list(model.parameters())
    each = [torch.autograd.grad(v, weights, retain_graph=True) for v in outputs(model, x).flatten()]
    return torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each])


@pytest.mark.parametrize("kind", ["FCN", "LeNet"])
@pytest.mark.parametrize("method", [*mgs_common.GRIDS, "MGS, log det"])
def test_one_step_of_every_method(kind, method):
    recipe = mgs_common.Recipe(method, 0.2 if method == "dropout" else 0.01)
    model = mgs_common.build(kind, (1, 8, 8), recipe.dropout)
    x, y = torch.rand(6, 1, 8, 8), torch.randint(0, 10, (6,))
    loss = mgs_common.step_loss(model, x, y, recipe, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    plain = F.cross_entropy(model.eval()(x), y)
    if method.startswith("loss gradient"):
        f = mgs.loss_gradient_penalty(model, x, y, method.removeprefix("loss gradient, "))
        torch.testing.assert_close(loss, plain + 0.01 * f)
    elif method == "MGS":
        assert loss > plain
    elif method != "dropout" and method != "MGS, log det":
        assert torch.equal(loss, plain)


def test_rates_of_the_methods():
    model = nn.Linear(2, 2)
    rates = {}
    for method, strength in (("none", 0.0), ("Adam", 1e-3), ("cyclical rate", 0.2)):
        optimizer, schedule = mgs_common.optimizer_of(model, mgs_common.Recipe(method, strength), 100)
        rates[method] = [optimizer.param_groups[0]["lr"]]
        for _ in range(100):
            optimizer.step()
            schedule.step()
            rates[method].append(optimizer.param_groups[0]["lr"])
    assert rates["none"][0] == 0.05 and rates["none"][-1] == pytest.approx(0.025)
    assert rates["Adam"][0] == 1e-3 and rates["Adam"][-1] == pytest.approx(5e-4)
    peaks = [step for step, lr in enumerate(rates["cyclical rate"]) if lr == pytest.approx(0.2)]
    assert peaks == [10, 30, 50, 70, 90] and min(rates["cyclical rate"]) == pytest.approx(0.01)
    decayed, _ = mgs_common.optimizer_of(model, mgs_common.Recipe("weight decay", 0.3, optimizer="Adam"), 100)
    assert isinstance(decayed, torch.optim.Adam) and decayed.param_groups[0]["weight_decay"] == 0.3


def test_chosen_strengths():
    grids = {"none": (0.0,), "a": (1.0, 2.0, 3.0)}
    cells = {"n/tuning/a/1.0": 0.1, "n/tuning/a/2.0": 0.3, "n/tuning/a/3.0": None, "m/tuning/a/3.0": 1.0}
    assert mgs_common.chosen(cells, "n", grids) == {"none": 0.0, "a": 2.0}
    assert mgs_common.strength_of("a", 2.0, grids["a"]) == "a, 2"
    assert mgs_common.strength_of("a", 3.0, grids["a"]) == "a, 3 (edge)"
    assert mgs_common.strength_of("none", 0.0, grids["none"]) == "none"
    assert mgs_common.rank_correlation([1.0, 4.0, 2.0], [10.0, 30.0, 11.0]) == pytest.approx(1)
    assert mgs_common.rank_correlation([1.0, 4.0, 2.0], [-10.0, -30.0, -11.0]) == pytest.approx(-1)


def test_kernels_of_thinned_nets():
    """Against rows by autograd of a net whose masks are written out; masks of ones are the net in evaluation mode."""
    torch.manual_seed(0)
    model = mgs_common.build("FCN", (1, 2, 2), 0.5, outputs=3).double().eval()
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    batch = mgs_dropout.masked(model, x, 0)
    masks = [batch[f"mask{j}"] for j in range(3)]
    assert all(set(mask.unique().tolist()) == {0.0, 2.0} for mask in masks)

    def outputs(net, h):
        h = h.flatten(1)
        for layer, mask in zip([m for m in net if isinstance(m, nn.Linear)], [*masks, None]):
            h = layer(h) if mask is None else F.relu(layer(h)) * mask
        return h

    rows = _rows(model, x, outputs)
    kernel = rows @ rows.T
    found = mgs_dropout.kernel_of(model, batch, whole=False)
    assert found["trace"] == pytest.approx(float(kernel.trace()) / 12)
    assert found["missing rank"] == 12 - int(torch.linalg.matrix_rank(kernel, hermitian=True))
    ones = {"x": x, **{f"mask{j}": torch.ones_like(mask) for j, mask in enumerate(masks)}}
    whole, plain = (mgs_dropout.kernel_of(model, ones, whole=w) for w in (True, False))
    assert whole == pytest.approx(plain)


def test_flipped_circles():
    x, y, flipped = mgs_circles.circles(400, 0.15, 0)
    _, clean, none = mgs_circles.circles(400, 0.0, 0)
    assert x.shape == (400, 2) and not none.any() and 30 < int(flipped.sum()) < 90
    assert torch.equal((y != clean)[:, 0], flipped)


def test_digits_on_patches():
    generator, kinds = torch.Generator().manual_seed(0), torch.tensor([0, 1, 1])
    digits = torch.zeros(3, 1, 4, 4)
    digits[:, :, 1, 1] = 1.0
    found = lazy_background.on_patches(digits, kinds, generator)
    assert found.shape == (3, 3, 4, 4) and torch.equal(found[:, :, 1, 1], torch.ones(3, 3))
    for image, kind in zip(found, kinds.tolist()):
        patches = (
            lazy_background.photographs()[kind].unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        )
        off = (patches - image).abs()
        off[:, :, 1, 1] = 0.0
        assert float(off.amax((1, 2, 3)).min()) < 1e-6
    y = torch.arange(2000) % 2
    share = float((lazy_background.agreeing(y, 0.95, generator) == y).float().mean())
    assert 0.93 < share < 0.97


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_descents_by_minibatches(alpha):
    """At scale 1 the descent is plain SGD; at another its first step moves outputs as much, to first order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x, y = torch.randn(20, 3).double(), torch.randint(0, 2, (20,))
    measure = lambda scaled, outputs: {"first": outputs[0, 0]}
    settings = {"lr": 0.01, "until": 0.0, "seed": 3, "batch": 5, "probe": 4}
    run = lazy_minibatches.descend(model, alpha, x, y, measure, steps=6, **settings)
    assert run["step"] == [0, 1, 2, 3, 4, 5, 6] and run["kernel"][0] == pytest.approx(1)
    optimizer, order, losses = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), torch.Generator(), []
    order.manual_seed(3)
    for bx, by in [batch for _ in range(2) for batch in batches(x, y, 5, order)]:
        losses.append(float(F.cross_entropy(model(x), y).detach()))
        optimizer.zero_grad()
        F.cross_entropy(model(bx), by).backward()
        optimizer.step()
    if alpha == 1:
        assert run["loss"] == pytest.approx(losses[:7])
    else:
        assert run["loss"][1] == pytest.approx(losses[1], rel=1e-3) and run["kernel"][-1] > 0.99
    at = lazy_minibatches.at({"loss": [3.0, 1.0], "a": [0.0, 1.0], "b": [None, 2.0]}, "loss", (2.0, 0.5))
    assert at["a"].tolist()[0] == 0.5 and bool(at["a"][1].isnan()) and bool(at["b"].isnan().all())


@pytest.mark.parametrize("form", [f for f in permuted_mnist.FORMS.values() if f is not None])
def test_penalties_of_the_tasks_before(form):
    """Value and gradient against dense matrices of the same kind; permuted digits are the digits."""
    x, y = torch.rand(30, 1, 3, 3).double(), torch.randint(0, 3, (30,))
    data = Data(x, y, x[:5], y[:5])
    tasks = [permuted_mnist.permuted(data, task) for task in range(3)]
    assert torch.equal(tasks[0].x, x.flatten(1)) and not torch.equal(tasks[1].x, tasks[2].x)
    assert torch.equal(tasks[1].x.sort(1).values, x.flatten(1).sort(1).values)
    torch.manual_seed(0)
    model, past = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3)).double(), []
    for task in tasks[:2]:
        past.append(permuted_mnist.remembered(model, form, task, 20))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
    found = permuted_mnist.penalty(model, past)
    found.backward()
    now, value, grad = nng.PVector.from_model(model).flat(), 0.0, 0.0
    for matrix, anchor in past:
        dense, moved = matrix.to_dense(), now - anchor.flat()
        value, grad = value + 0.5 * moved @ dense @ moved, grad + dense @ moved
    torch.testing.assert_close(found.detach(), value)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), grad)


def test_characters_are_permuted_blocks_in_turns():
    """By slices: every block of an image is a block of the digit, and two images are in one form every eighth time."""
    x = torch.rand(17, 1, 8, 8)
    one, eight = (alignment_difficult.characters(x, forms) for forms in (1, 8))
    blocks = lambda v: [v[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] for i in range(4) for j in range(4)]
    orders = []
    for digit, image in zip(x, eight):
        places = [[torch.equal(a, b) for b in blocks(digit)].index(True) for a in blocks(image)]
        assert sorted(places) == list(range(16))
        orders.append(places)
    assert orders[:8] == orders[8:16] and len({tuple(o) for o in orders}) == 8
    assert torch.equal(one[::8], eight[::8]) and not torch.equal(one[1], eight[1])


def test_runs_together_at_equal_progress():
    """Two runs that fall linearly: what is read at a level of the loss is what a line through the records says."""
    steep = {"loss": [8.0, 4.0, 1.0, 2.0], "a": [0.0, 4.0, 7.0, 9.0]}  # a = 8 - loss until it turns
    slow = {"loss": [6.0, 5.0, None, 2.0], "a": [0.0, 1.0, None, 4.0]}  # a = 6 - loss
    levels, curves = lazy_minibatches.together([steep, slow], "loss")
    assert float(levels[0]) == pytest.approx(6) and float(levels[-1]) == 2 and len(levels) == 40
    torch.testing.assert_close(curves["a"][0], 8 - levels)
    between = levels > 5
    torch.testing.assert_close(curves["a"][1, between], 6 - levels[between])
    assert curves["a"][:, -1].tolist() == [6, 4]
