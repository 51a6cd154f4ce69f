"""Winsorized gradients and medians of means."""

import copy

import numpy as np
import pytest
import reference
import torch
from cases import CASES, build
from torch.nn import functional as F

import nngeom as nng
from nngeom.core import memory
from nngeom.optim import WinsorizedSGD, median_of_means_gradient, winsorized_gradient
from nngeom.optim.robust import winsorized

EACH = lambda f, y: F.cross_entropy(f, y, reduction="none")


def clipped_mean(rows, level):
    """numpy's percentiles, column by column."""
    low, high = np.percentile(rows, level, axis=0), np.percentile(rows, 100 - level, axis=0)
    return np.clip(rows, low, high).mean(0)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "transformer", "gru", "tied"])
@pytest.mark.parametrize("level", [0, 12.5, 33, 50])
def test_winsorized_gradient(name, level):
    case = build(name)
    rows = reference.loss_gradients(case.model, case.inputs, case.targets, EACH).numpy()
    v = winsorized_gradient(case.model, (case.inputs, case.targets), "cross_entropy", level)
    assert np.allclose(v.flat().numpy(), clipped_mean(rows, level), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::nngeom.MemoryWarning")
@pytest.mark.parametrize("name", CASES)
def test_some_coordinates_at_a_time(name):
    case = build(name)
    rows = reference.loss_gradients(case.model, case.inputs, case.targets, EACH).numpy()
    with memory.limit(600):
        v = winsorized_gradient(case.model, case.loader, "cross_entropy", 12.5)
    assert np.allclose(v.flat().numpy(), clipped_mean(rows, 12.5), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "attention"])
@pytest.mark.parametrize("groups", [1, 2, 3, 7])
def test_median_of_means(name, groups):
    case = build(name)
    rows = reference.loss_gradients(case.model, case.inputs, case.targets, EACH).numpy()
    expected = np.median([part.mean(0) for part in np.array_split(rows, groups)], axis=0)
    v = median_of_means_gradient(case.model, (case.inputs, case.targets), "cross_entropy", groups)
    assert np.allclose(v.flat().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level, expected", [(0, -0.25), (10, -0.175), (25, -0.0625), (33.34, 0.0), (50, 0.0)])
def test_numbers_worked_out_by_hand(level, expected):
    rows = torch.tensor([[-1.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    assert float(winsorized(rows, level).mean()) == pytest.approx(expected, abs=1e-4)
    scrambled = -3 * rows[[2, 0, 3, 1]]
    assert float(winsorized(scrambled, level).mean()) == pytest.approx(-3 * expected, abs=3e-4)


def test_real_features_survive_and_memorised_ones_do_not():
    y = torch.tensor([1.0, -1, -1, 1, -1], dtype=torch.float64)
    for real, weights, prediction in [(True, [0, 0, 0, 0, 0, 1.0], -1.0), (False, [0.0] * 6, 0.0)]:
        x = torch.diag(y)
        x = torch.cat([x, y[:, None] if real else torch.zeros(5, 1, dtype=torch.float64)], 1)
        model = torch.nn.Linear(6, 1, bias=False).double()
        torch.nn.init.zeros_(model.weight)
        opt = WinsorizedSGD(model, lr=0.5, level=40)
        for _ in range(60):
            opt.zero_grad()
            with opt.observe():
                (0.5 * (model(x[:4])[:, 0] - y[:4]) ** 2).mean().backward()
            opt.step()
        assert torch.allclose(model.weight[0], torch.tensor(weights, dtype=torch.float64), atol=1e-6)
        assert float(model(x[4:]).detach()) == pytest.approx(prediction, abs=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sgd_on_winsorized_gradients(reduction):
    case = build("conv2d", sizes=(3, 5))
    other = copy.deepcopy(case.model)
    opt, sgd = (
        WinsorizedSGD(case.model, lr=0.1, level=20, momentum=0.9),
        torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9),
    )
    for _ in range(3):
        opt.zero_grad()
        for x, y in case.loader:
            with opt.observe():
                loss = F.cross_entropy(case.model(x), y, reduction=reduction) * (
                    len(x) / case.n if reduction == "mean" else 1
                )
                (loss + 0.01 / 2 * sum(p.square().sum() for p in case.model.parameters())).backward()
        opt.step()
        v = winsorized_gradient(other, (case.inputs, case.targets), "cross_entropy", 20)
        for name, p in other.named_parameters():
            p.grad = v[name] * (1 if reduction == "mean" else case.n) + 0.02 * p.detach()
        sgd.step()
    assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(case.model.parameters(), other.parameters()))


def test_what_is_refused():
    case = build("mlp")
    batch = (case.inputs, case.targets)
    for level in (-1, 51):
        with pytest.raises(nng.ArgumentError, match="0 to 50"):
            winsorized_gradient(case.model, batch, "cross_entropy", level)
    for groups in (0, 8, 1.5):
        with pytest.raises(nng.ArgumentError, match="whole number"):
            median_of_means_gradient(case.model, batch, "cross_entropy", groups)
    with pytest.raises(nng.ArgumentError, match="observed"):
        WinsorizedSGD(case.model).step()
    odd = build("weight-norm")
    with pytest.raises(nng.CoverageError, match="winsorized_gradient"), WinsorizedSGD(odd.model).observe():
        F.cross_entropy(odd.model(odd.inputs), odd.targets).backward()
