"""What the examples of training geometry share: data (digits, or a folder of MNIST or CIFAR-10 files), nets,
figures.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Okabe & Ito's colours, distinguishable with any colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


@dataclass(frozen=True)
class Data:
    """Images ``(n, channels, height, width)`` in about [0, 1] and labels, for training and for the test."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return tuple(self.x.shape[1:])  # type: ignore[return-value]


def load(folder: Path | None, train: int, test: int, seed: int = 0) -> Data:
    """Scikit-learn's digits, or the MNIST (idx) or CIFAR-10 (binary) files of a folder, shuffled and cut."""
    if folder is None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        first, last = order[:train], order[-test:]
        return Data(x[first], y[first], x[last], y[last])
    sets = (
        [_idx(folder, "train"), _idx(folder, "t10k")]
        if _find(folder, "train-images")
        else [_cifar(folder, "data_batch"), _cifar(folder, "test_batch")]
    )
    parts: list[Tensor] = []
    for (x, y), size in zip(sets, (train, test)):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:size]
        parts += [x[order].float() / 255, y[order].long()]
    return Data(*parts)


def _find(folder: Path, start: str) -> list[Path]:
    return sorted(p for p in folder.rglob(f"{start}*") if p.is_file())


def _idx(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    arrays = []
    for kind, header in (("images", 16), ("labels", 8)):
        path = _find(folder, f"{part}-{kind}")[0]
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        arrays.append(torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).copy()))
    return arrays[0].view(len(arrays[1]), 1, 28, 28), arrays[1]


def _cifar(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    raw = np.concatenate([np.frombuffer(p.read_bytes(), np.uint8) for p in _find(folder, part) if p.suffix == ".bin"])
    rows = torch.from_numpy(raw.copy()).view(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def corrupt(y: Tensor, share: float, generator: torch.Generator, classes: int = 10) -> Tensor:
    """Labels of which a share is replaced by a different class, drawn uniformly."""
    out, n = y.clone(), round(share * len(y))
    index = torch.randperm(len(y), generator=generator)[:n]
    out[index] = (y[index] + torch.randint(1, classes, (n,), generator=generator)) % classes
    return out


def motion_blur(x: Tensor, width: int = 3) -> Tensor:
    """Horizontal mean over ``width`` pixels."""
    c = x.shape[1]
    return nn.functional.conv2d(x, torch.full((c, 1, 1, width), 1 / width), padding=(0, width // 2), groups=c)


def mlp(inputs: int, width: int, depth: int, outputs: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """``depth`` hidden ReLU layers on flattened inputs, PyTorch's initialisation."""
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def lenet(shape: tuple[int, int, int], outputs: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """Two convolutions and pools, three linear layers."""
    channels, height, width = shape
    drop: Callable[[], list[nn.Module]] = lambda: [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (height // 4) * (width // 4), 120),
        nn.ReLU(),
        *drop(),
        nn.Linear(120, 84),
        nn.ReLU(),
        *drop(),
        nn.Linear(84, outputs),
    )


def batches(x: Tensor, y: Tensor, size: int, generator: torch.Generator) -> Any:
    """The minibatches of one epoch, in a fresh order."""
    order = torch.randperm(len(x), generator=generator)
    for lo in range(0, len(x), size):
        yield x[order[lo : lo + size]], y[order[lo : lo + size]]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right classes, in evaluation mode; the mode is put back."""
    training = model.training
    out = float((model.eval()(x).argmax(1) == y).float().mean())
    model.train(training)
    return out


def figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure in the common style and its axes, always ``(rows, columns)``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 9.5,
            "legend.frameon": False,
        }
    )
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, constrained_layout=True, **options)


def band(ax: Any, x: Any, runs: Any, label: str, colour: str, **options: Any) -> None:
    """The mean over runs ``(seeds, points)`` and one standard deviation around it."""
    runs = np.asarray(runs, dtype=float)
    middle = np.nanmean(runs, 0)
    ax.plot(x, middle, color=colour, label=label, lw=1.6, **options)
    if len(runs) > 1:
        spread = np.nanstd(runs, 0)
        ax.fill_between(x, middle - spread, middle + spread, color=colour, alpha=0.15, lw=0)
