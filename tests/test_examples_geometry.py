"""What the examples of training geometry are built from: readers of data files, corruptions, small problems."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import fourier_bias
import geometry_common as common
import supernat
import which_norm

from nngeom import analysis


def test_mnist_files(tmp_path):
    images, labels = (np.arange(4 * 784) % 256).astype(np.uint8), np.array([3, 1, 2, 0], np.uint8)
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(bytes(16) + images.tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    data = common.load(tmp_path, 3, 4)
    assert data.shape == (1, 28, 28) and len(data.x) == 3 and sorted(data.y_test.tolist()) == [0, 1, 2, 3]
    whole = torch.from_numpy(images).view(4, 1, 28, 28)[torch.from_numpy(labels).long().argsort()].float() / 255
    assert torch.equal(data.x_test[data.y_test.argsort()], whole)


def test_cifar_files(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (5, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(5)
    for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
        (tmp_path / name).write_bytes(rows.tobytes())
    data = common.load(tmp_path, 10, 5)
    assert data.shape == (3, 32, 32) and len(data.y) == 10
    assert torch.equal(
        (data.x_test[data.y_test == 2][0] * 255).round().flatten(), torch.from_numpy(rows[2, 1:].copy()).float()
    )


def test_corruptions():
    y = torch.randint(0, 10, (200,))
    noisy = common.corrupt(y, 0.3, torch.Generator().manual_seed(0))
    assert int((noisy != y).sum()) == 60 and 0 <= int(noisy.min()) and int(noisy.max()) < 10
    x = torch.zeros(1, 1, 3, 5)
    x[0, 0, 1, 2] = 1
    assert torch.allclose(common.motion_blur(x)[0, 0, 1], torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0]))


def test_supernat_wins_on_its_problem():
    """Lower test error than gradient descent at the end, on the mean of five draws; not with the trace-preserving
    scale.
    """
    errors = dict.fromkeys(supernat.METHODS, 0.0)
    for seed in range(5):
        x, y, xt, yt = supernat.problem(seed)
        for name, kappa in supernat.METHODS.items():
            model = analysis.SuperNat(x, y, 0.5, kappa)
            for _ in range(supernat.STEPS):
                model.step()
            errors[name] += float((xt @ model.weights - yt).square().mean()) / 5
    descent, largest, trace = errors.values()
    assert largest < 0.5 * descent and abs(trace - descent) < 0.05 * descent


def test_frequencies_of_waves():
    x = torch.arange(50, dtype=torch.float64) / 50
    waves = torch.stack([torch.cos(2 * torch.pi * k * x + k) for k in range(25)])
    assert torch.allclose(fourier_bias.fourier(waves), torch.eye(25, 26, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(fourier_bias.mean_frequency(waves), torch.arange(25.0, dtype=torch.float64), atol=1e-10)


def test_random_net_prefers_slow_functions():
    """The rank correlation and the fast decay hold for the default initialisation; He's without biases is linear beside
    0: centred rank 2.
    """
    grid = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None]
    found = analysis.eigenfunctions(fourier_bias.net(0), [grid], 50, centered=True)
    frequency = fourier_bias.mean_frequency(found.functions[:, 0])
    assert fourier_bias.spearmanr(range(25), frequency[:25]).statistic > 0.8
    assert 0.002 < found.eigenvalues[9] / found.eigenvalues[0] < 0.03
    assert (
        analysis.spectrum(analysis.eigenfunctions(fourier_bias.net(0, he=True), [grid], 50, centered=True).eigenvalues)
        > 0
    ).sum() <= 2


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0])
def test_which_norm(c):
    """The weights interpolate; the bounds are those of their definitions, by the singular values of the rows."""
    psi, l, y = which_norm.features()
    assert (
        torch.allclose(psi.T @ psi, torch.eye(1000, dtype=torch.float64), atol=1e-10)
        and 0.2 < float((y > 0).double().mean()) < 0.8
    )
    index, l = torch.arange(7, 1000, 20), 1 + c * (l - 1)
    weights, error, plain, best = which_norm.subsample(psi, l, y, index)
    rows = psi[index] * l.sqrt()
    assert torch.allclose(
        weights,
        torch.linalg.lstsq(rows, y[index], rcond=1e-5, driver="gelsd").solution,
        atol=1e-6 * float(weights.abs().max()),
    )
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    keep = s > 1e-5 * s[0]
    assert plain == pytest.approx(float(weights.norm() * s[keep].norm() / 50), rel=1e-6)
    assert best < plain
    if c == 1:  # elsewhere eigenvalues coincide, and with them the choice of eigenvectors is free
        assert best == pytest.approx(float((u[:, keep].T @ y[index]).abs().sum() / 50), rel=1e-6)
    assert error == 0.5 if c == 0 else error < 0.1
